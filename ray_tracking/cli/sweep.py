"""`ray-tracking sweep TARGET` searches over params; `ray-tracking sweep show SWEEP` shows what was found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ray_tracking.cli.options import (
    Address,
    ConfigFile,
    Debug,
    Environment,
    Json,
    Settings,
    StorageUri,
    load_config,
    open_store,
    overrides_of,
)
from ray_tracking.extras import require

if TYPE_CHECKING:
    from ray_tracking.monitoring.sweep import SweepView, TrialView
    from ray_tracking.runs.store import RunStore

_RUN = "run"
_HELP = ("-h", "--help")


class _TargetOrCommand(TyperGroup):
    """`sweep show ...` is a command; anything else is what `sweep` itself takes."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, *_HELP}:
            args = [_RUN, *args]
        return super().parse_args(ctx, args)


group = typer.Typer(
    cls=_TargetOrCommand,
    no_args_is_help=True,
    help="Search over params: many trials of one function.\n\n"
    "`sweep TARGET -c FILE` searches, `sweep show SWEEP` shows.",
)


@group.command(_RUN)
def run(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="module:function or path/file.py:function.")],
    config: ConfigFile = None,
    env: Environment = None,
    settings: Settings = None,
    storage: StorageUri = None,
    run_id: Annotated[
        str | None, typer.Option("--run-id", metavar="ID", help="The sweep's id; default: name and time.")
    ] = None,
    address: Address = None,
    debug: Debug = False,
) -> None:
    """Search over the params of TARGET, as `sweep TARGET` does too."""
    require("ray", "ray", "torch")
    from ray_tracking.log import configure
    from ray_tracking.runs.store import check_run_id
    from ray_tracking.runtime.target import load_target, ship_by_value
    from ray_tracking.storage import Storage

    resolved = load_config(config, env, overrides_of(settings, storage))
    configure("debug" if debug else resolved.logging.level, json=resolved.logging.json)
    if run_id is not None:
        check_run_id(run_id)
    opened = Storage.open(resolved.storage)
    opened.probe()
    loaded = load_target(target)

    from ray_tracking.cli.sweep_progress import SweepProgressView
    from ray_tracking.runtime.trainer import TrainingManager

    ship_by_value(loaded)
    manager = TrainingManager(resolved, run_id=run_id, address=address)
    try:
        with SweepProgressView() as view:
            manager.sweep(loaded.function, entrypoint=target, code_digest=loaded.digest, observer=view.report)
    except KeyboardInterrupt:
        typer.echo(f"Go on with: ray-tracking resume {manager.run_id}", err=True)
        raise
    print_sweep(manager.run_id, resolved.storage)


@group.command("show")
def show(
    sweep: Annotated[str, typer.Argument(metavar="SWEEP", help="A sweep's id, the beginning of one, or `latest`.")],
    storage: StorageUri = None,
    config: ConfigFile = None,
    env: Environment = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show a sweep: its trials, best first, and where the best one lies."""
    import time

    from ray_tracking.cli import output
    from ray_tracking.monitoring.select import select_run
    from ray_tracking.monitoring.sweep import sweep_view

    store = open_store(storage, config, env)
    view = sweep_view(store, select_run(store, sweep), time.time())
    if as_json:
        output.print_json(view.to_json())
    else:
        _print(view)


def resume_sweep(store: RunStore, sweep_id: str, train: Any, overrides: Mapping[str, Any], address: str | None) -> None:
    """For `resume`, of a sweep. `train`: the function if it is not where it was, else None."""
    from ray_tracking.cli.sweep_progress import SweepProgressView
    from ray_tracking.runtime.sweep import resuming

    with SweepProgressView() as view:
        resuming.resume_sweep(store, sweep_id, train=train, overrides=overrides, address=address, observer=view.report)
    print_sweep(sweep_id, store.storage.uri)


def print_sweep(sweep_id: str, storage: str) -> None:
    """What `sweep show` prints, at the end of a sweep."""
    import time

    from ray_tracking.monitoring.sweep import sweep_view
    from ray_tracking.runs.store import RunStore
    from ray_tracking.storage import Storage

    _print(sweep_view(RunStore(Storage.open(storage)), sweep_id, time.time()))


def _print(view: SweepView) -> None:
    from ray_tracking.cli import output

    screen = output.console()
    screen.print(
        output.facts(
            [
                ("sweep", view.sweep_id),
                ("status", view.status),
                ("metric", f"{view.metric}, {view.mode} is best"),
                ("took", output.duration((view.ended or view.created) - view.created) if view.ended else None),
                ("where", view.path),
            ]
        )
    )
    order = {number: place for place, number in enumerate(view.ranking, 1)}
    trials = sorted(view.trials, key=lambda trial: (order.get(trial.trial, len(order) + 1), trial.trial))
    columns = ("trial", "status", view.metric, "params", "took")
    screen.print()
    screen.print(output.table("Trials, best first", columns, [_row(trial) for trial in trials], right=(view.metric,)))
    for trial in view.trials:
        if trial.status == "failed":
            screen.print(output.cell(f"Trial {trial.trial} failed: {trial.reason}"))
    if view.best is None:
        screen.print(output.cell("No trial has got to a value yet."))
        return
    best = view.best
    screen.print()
    screen.print(
        output.facts(
            [
                ("best", f"trial {best.trial}, {view.metric} {output.number(best.value)}"),
                ("run", best.run_id),
                ("checkpoint", best.checkpoint or "none kept"),
                ("params", shown(best.params)),
            ]
        )
    )


def _row(trial: TrialView) -> tuple[object, ...]:
    from ray_tracking.cli import output

    took = output.duration(trial.ended - trial.started) if trial.ended and trial.started else "-"
    return trial.trial, trial.status, output.number(trial.value), shown(trial.params), took


def shown(params: Mapping[str, Any], prefix: str = "") -> str:
    """`lr=0.001 optimizer.kind=adam`."""
    from ray_tracking.cli import output

    parts = []
    for key, value in params.items():
        if isinstance(value, Mapping):
            parts.append(shown(value, f"{prefix}{key}."))
        else:
            text = output.number(value) if isinstance(value, float) else _text(value)
            parts.append(f"{prefix}{key}={text}")
    return " ".join(parts)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
