"""`ray-tracking sync RUN`: fills what backends lack of a run that has ended, from its journal; of a sweep, of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ray_tracking.cli.options import ConfigFile, Debug, Environment, Json, Run, Settings, StorageUri, open_store

if TYPE_CHECKING:
    from ray_tracking.runs.store import RunStore
    from ray_tracking.tracking.syncing import Outcome

_GROUPING = ("mlflow",)
"""Backends in which a sweep is a run of its own, above its trials."""


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

    They get what they lack, and nothing twice. Of a sweep, those of its trials are filled too.

    -c and --env only say where the runs lie. --set says how a backend is reached, if that is no longer as recorded or
    the run never had it: --backend mlflow --set experiment_tracking.mlflow.tracking_uri=http://host:5000, say.
    """
    from ray_tracking.cli import output
    from ray_tracking.config import parse_assignments
    from ray_tracking.errors import RayTrackingError
    from ray_tracking.log import configure
    from ray_tracking.monitoring.select import select_run

    configure("debug" if debug else "error")  # what fails is said below, once
    given = parse_assignments(settings or [])
    store = open_store(storage, config, env)
    run_id = select_run(store, run)
    trials = store.trials(run_id)
    wanted = backends or []
    own = _own_backends(store, run_id, wanted) if trials else wanted
    outcomes = {run_id: [] if own is None else _fill(store, run_id, given, own, again)}
    refused: list[RayTrackingError] = []
    for trial in trials:
        try:
            outcomes[trial] = _fill(store, trial, given, wanted, again)
        except RayTrackingError as error:  # one trial must not keep the others from what they lack
            refused.append(error)
    if as_json:
        documents = {each: {one.backend: _document(one) for one in found} for each, found in outcomes.items()}
        of_trials = {"trials": {trial: documents.get(trial) for trial in trials}} if trials else {}
        output.print_json({"run_id": run_id, "backends": documents[run_id], **of_trials})
    elif trials:
        _print_sweep(run_id, len(trials), outcomes)
    else:
        _print(run_id, outcomes[run_id])
    for refusal in refused:
        typer.echo(str(refusal), err=True)
    if refused or not all(one.is_complete for found in outcomes.values() for one in found):
        raise typer.Exit(refused[0].exit_code if refused else 1)


def _own_backends(store: RunStore, sweep_id: str, wanted: Sequence[str]) -> list[str] | None:
    """Those of `wanted` that the sweep's own run has beside its trials; None if there is nothing to fill."""
    from ray_tracking.monitoring.overview import enabled_backends
    from ray_tracking.tracking.cursor import Cursor

    cursors = {cursor.backend for cursor in Cursor.load_all(store.directory(sweep_id))}
    has = cursors | set(enabled_backends(store.load(sweep_id).config))
    if wanted:
        return [name for name in wanted if name in has or name in _GROUPING] or None
    return [] if has else None


def _fill(
    store: RunStore, run_id: str, given: Mapping[str, object], backends: Sequence[str], again: bool
) -> list[Outcome]:
    import time

    from ray_tracking.cli.bar import Bar
    from ray_tracking.monitoring.overview import last_sign_of_life, status_now
    from ray_tracking.runs.record import Status
    from ray_tracking.runs.summary import Summary
    from ray_tracking.tracking import syncing
    from ray_tracking.tracking.cursor import Cursor
    from ray_tracking.tracking.recorded import touched_by, tracking_of

    record = store.load(run_id)
    directory = store.directory(run_id)
    tracking = tracking_of(record, Cursor.load_all(directory), given, backends)
    alive = status_now(record, last_sign_of_life(record, Summary.load(directory)), time.time()) == Status.RUNNING
    with Bar(f"Syncing {run_id}", 0, unit="records") as bar:
        return syncing.sync(
            store,
            record,
            tracking,
            looks_alive=alive,
            touched={*touched_by(given), *backends},
            again=again,
            progress=bar.reach,
        )


def _document(one: Outcome) -> dict[str, Any]:
    return {
        "state": one.state.value,
        "delivered": one.delivered,
        "pending": one.pending,
        "location": one.location,
        "error": one.error,
    }


def _print_sweep(sweep_id: str, trials: int, outcomes: Mapping[str, list[Outcome]]) -> None:
    """A line per backend over all runs of the sweep; what went wrong, by run."""
    from ray_tracking.cli import output

    by_backend: dict[str, list[Outcome]] = {}
    for found in outcomes.values():
        for one in found:
            by_backend.setdefault(one.backend, []).append(one)
    rows = [
        (
            name,
            f"{sum(one.is_complete for one in found)} of {len(found)}",
            sum(one.delivered for one in found),
            sum(one.pending for one in found),
            found[-1].location,
        )
        for name, found in by_backend.items()
    ]
    columns = ("backend", "complete", "delivered", "pending", "where (the last)")
    title = f"Backends of {sweep_id} and its {trials} trial{'s' * (trials != 1)}"
    output.console().print(output.table(title, columns, rows, right=("complete", "delivered", "pending")))
    for run_id, found in outcomes.items():
        _complain(found, f"{run_id}: ")


def _print(run_id: str, outcomes: list[Outcome]) -> None:
    from ray_tracking.cli import output

    rows = [(one.backend, one.state.value, one.delivered, one.pending, one.location) for one in outcomes]
    columns = ("backend", "state", "delivered", "pending", "where")
    output.console().print(output.table(f"Backends of {run_id}", columns, rows, right=("delivered", "pending")))
    _complain(outcomes)


def _complain(outcomes: list[Outcome], prefix: str = "") -> None:
    from ray_tracking.cli import output

    for one in outcomes:
        if not one.is_complete:
            why = output.printable(one.error or "no reason known")
            typer.echo(f"{prefix}{one.backend} is {one.state.value}: {why}", err=True)
