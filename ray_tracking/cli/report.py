"""`ray-tracking report RUN -o FILE`: a sweep or a run as one page for any browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ray_tracking.cli.options import ConfigFile, Debug, Environment, Run, StorageUri, open_store


def report(
    run: Run = "latest",
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="A file ending in .html; default: the run's id and .html."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    storage: StorageUri = None,
    config: ConfigFile = None,
    env: Environment = None,
    debug: Debug = False,
) -> None:
    """Write a sweep or a run as one page.

    It opens in any browser and loads nothing from anywhere; what looks like a secret is not in it.
    """
    from ray_tracking.cli import output as printing
    from ray_tracking.extras import require
    from ray_tracking.monitoring.report.files import check_page, write_page
    from ray_tracking.monitoring.select import select_run
    from ray_tracking.runs.sweep import SweepStore

    require("report", "plotly")
    if output is not None:
        check_page(output, force=force)
    store = open_store(storage, config, env)
    run_id = select_run(store, run)
    path = output or Path(f"{run_id}.html")
    check_page(path, force=force)
    if SweepStore(store, run_id).exists():
        from ray_tracking.monitoring.report.sweep import sweep_report

        page = sweep_report(store, run_id)
    else:
        from ray_tracking.monitoring.report.run import run_report

        page = run_report(store, run_id)
    write_page(page, path)
    typer.echo(f"{run_id} in {path} ({printing.size(path.stat().st_size)}): open it in a browser.", err=True)
