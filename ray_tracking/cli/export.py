"""`ray-tracking export RUN -o FILE`: the effective history of a run as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ray_tracking.cli.options import ConfigFile, Debug, Environment, Run, StorageUri, open_store


def export(
    run: Run,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="FILE", help="A file ending in .parquet, .csv or .jsonl."),
    ],
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    storage: StorageUri = None,
    config: ConfigFile = None,
    env: Environment = None,
    debug: Debug = False,
) -> None:
    """Write a run's metrics to a Parquet, CSV or JSON lines file.

    Its columns are key, step, value, time, rank, attempt: the history as it counts, without what a resume replaced.
    """
    from ray_tracking.monitoring.export import check_output, export_run
    from ray_tracking.monitoring.select import select_run

    check_output(output, force=force)
    store = open_store(storage, config, env)
    run_id = select_run(store, run)
    rows = export_run(store.directory(run_id), output, force=force)
    typer.echo(f"{rows} rows of {run_id} in {output}", err=True)
