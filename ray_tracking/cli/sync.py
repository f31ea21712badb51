"""`ray-tracking sync RUN`: fills what backends lack of a run that has ended, from its journal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ray_tracking.cli.options import ConfigFile, Debug, Environment, Json, Run, Settings, StorageUri, open_store

if TYPE_CHECKING:
    from ray_tracking.tracking.syncing import Outcome


def sync(
    run: Run = "latest",
    backends: Annotated[
        list[str] | None,
        typer.Option(
            "--backend", metavar="NAME", help="Only this one, also if the run never had it; repeatable. Default: all."
        ),
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Send all of it again: a backend has lost what it had. Nothing doubles.")
    ] = False,
    settings: Settings = None,
    config: ConfigFile = None,
    env: Environment = None,
    storage: StorageUri = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fill the backends of a run that has ended.

    They get what they lack, and nothing twice.

    -c and --env only say where the runs lie. --set says how a backend is reached, if that is no longer as recorded or
    the run never had it: --backend mlflow --set experiment_tracking.mlflow.tracking_uri=http://host:5000, say.
    """
    import time

    from ray_tracking.cli import output
    from ray_tracking.cli.bar import Bar
    from ray_tracking.config import parse_assignments
    from ray_tracking.log import configure
    from ray_tracking.monitoring.overview import last_sign_of_life, status_now
    from ray_tracking.monitoring.select import select_run
    from ray_tracking.runs.record import Status
    from ray_tracking.runs.summary import Summary
    from ray_tracking.tracking import syncing
    from ray_tracking.tracking.cursor import Cursor
    from ray_tracking.tracking.recorded import touched_by, tracking_of

    configure("debug" if debug else "error")  # what fails is said below, once
    given = parse_assignments(settings or [])
    store = open_store(storage, config, env)
    record = store.load(select_run(store, run))
    directory = store.directory(record.run_id)
    tracking = tracking_of(record, Cursor.load_all(directory), given, backends or ())
    alive = status_now(record, last_sign_of_life(record, Summary.load(directory)), time.time()) == Status.RUNNING
    with Bar(f"Syncing {record.run_id}", 0, unit="records") as bar:
        outcomes = syncing.sync(
            store,
            record,
            tracking,
            looks_alive=alive,
            touched={*touched_by(given), *(backends or ())},
            again=again,
            progress=bar.reach,
        )
    if as_json:
        output.print_json({"run_id": record.run_id, "backends": {one.backend: _document(one) for one in outcomes}})
    else:
        _print(record.run_id, outcomes)
    if not all(one.is_complete for one in outcomes):
        raise typer.Exit(1)


def _document(one: Outcome) -> dict[str, Any]:
    return {
        "state": one.state.value,
        "delivered": one.delivered,
        "pending": one.pending,
        "location": one.location,
        "error": one.error,
    }


def _print(run_id: str, outcomes: list[Outcome]) -> None:
    from ray_tracking.cli import output

    rows = [(one.backend, one.state.value, one.delivered, one.pending, one.location) for one in outcomes]
    columns = ("backend", "state", "delivered", "pending", "where")
    output.console().print(output.table(f"Backends of {run_id}", columns, rows, right=("delivered", "pending")))
    for one in outcomes:
        if not one.is_complete:
            typer.echo(
                f"{one.backend} is {one.state.value}: {output.printable(one.error or 'no reason known')}", err=True
            )
