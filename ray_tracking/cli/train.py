"""`ray-tracking train TARGET` and `ray-tracking demo`:
check everything that can be checked, then run on Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ray_tracking.cli.options import (
    Address,
    ConfigFile,
    Debug,
    Environment,
    ForceNew,
    RunId,
    Settings,
    StorageUri,
    load_config,
    overrides_of,
)
from ray_tracking.cli.supervising import Retries, driver_command, supervise
from ray_tracking.extras import require

if TYPE_CHECKING:
    from ray_tracking.config import Config

DEMO_TARGET = "ray_tracking.examples.digits:train"


def train(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="module:function or path/file.py:function.")],
    config: ConfigFile = None,
    env: Environment = None,
    settings: Settings = None,
    storage: StorageUri = None,
    run_id: RunId = None,
    force_new: ForceNew = False,
    address: Address = None,
    retries: Retries = 0,
    debug: Debug = False,
) -> None:
    """Train TARGET, a function that takes a `run`, on Ray workers."""
    require("ray", "ray", "torch")
    resolved = load_config(config, env, overrides_of(settings, storage))
    if force_new and run_id is not None:
        run_id = _free_run_id(run_id, resolved)
    if retries:
        given = [("-c", config), ("--env", env), ("--set", settings), ("--storage", storage), ("--address", address)]
        _supervised(target, resolved, run_id, retries, given, debug)
    _run(target, resolved, run_id, address, debug)


def demo(
    config: ConfigFile = None,
    env: Environment = None,
    settings: Settings = None,
    storage: StorageUri = None,
    run_id: RunId = None,
    address: Address = None,
    debug: Debug = False,
) -> None:
    """Train a small network on handwritten digits: try this first.

    The demo brings its own settings; a file given with -c takes their place.
    """
    require("all", "ray", "torch", "sklearn")
    overrides = overrides_of(settings, storage)
    resolved = load_config(config, env, overrides)
    if config is None:
        # checked above already: the example imports torch, and a misspelt key should not wait for it
        from ray_tracking.config import with_overrides
        from ray_tracking.examples.digits import demo_config

        resolved = with_overrides(load_config(None, env, demo_config()), overrides)
    _run(DEMO_TARGET, resolved, run_id, address, debug)


def _free_run_id(run_id: str, config: Config) -> str:
    from ray_tracking.runs.store import RunStore, check_run_id, free_run_id
    from ray_tracking.storage import Storage

    free = free_run_id(check_run_id(run_id), RunStore(Storage.open(config.storage)).is_taken)
    if free != run_id:
        typer.echo(f"There is a run {run_id!r} already; the new one is {free!r}.", err=True)
    return free


def _supervised(
    target: str,
    config: Config,
    run_id: str | None,
    retries: int,
    given: Sequence[tuple[str, object]],
    debug: bool,
) -> NoReturn:
    """Every start of the driver names the same run: the first makes it, the others go on with it."""
    from ray_tracking.log import configure
    from ray_tracking.runs.store import RunStore, check_run_id, new_run_id
    from ray_tracking.storage import Storage

    configure("debug" if debug else config.logging.level, json=config.logging.json)
    run_id = check_run_id(run_id or new_run_id(config.name))
    command = driver_command("train", target, options=[*given, ("--run-id", run_id), ("--debug", debug)])
    raise typer.Exit(supervise(command, RunStore(Storage.open(config.storage)), run_id, retries))


def _run(target: str, config: Config, run_id: str | None, address: str | None, debug: bool) -> None:
    """Everything that can be wrong is found in this order, the quick checks first, before ray is imported."""
    from ray_tracking.checkpoint.keys import Keyring
    from ray_tracking.cli.progress import ProgressView
    from ray_tracking.log import configure
    from ray_tracking.runs.store import check_run_id
    from ray_tracking.runtime.target import load_target, ship_by_value
    from ray_tracking.storage import Storage

    configure("debug" if debug else config.logging.level, json=config.logging.json)
    if run_id is not None:
        check_run_id(run_id)
    storage = Storage.open(config.storage)
    storage.probe()
    Keyring.from_config(config.training.default.encryption)
    loaded = load_target(target)

    from ray_tracking.runtime.trainer import TrainingManager

    ship_by_value(loaded)
    with ProgressView() as view:
        manager = TrainingManager(config, run_id=run_id, address=address, observer=view.report)
        result = manager.fit(loaded.function, entrypoint=target, code_digest=loaded.digest)
    print_result(result, storage)


def print_result(result: Any, storage: Any) -> None:
    """Final and best metrics, checkpoints kept, where to look."""
    import os
    import shlex
    import time

    from ray_tracking.cli import output
    from ray_tracking.cli.runs import print_backends
    from ray_tracking.monitoring.overview import overview
    from ray_tracking.runs.store import RunStore

    view = overview(RunStore(storage), result.run_id, time.time())
    screen = output.console()
    steps = [str(kept.step) + (" (best)" if kept.best else "") for kept in view.checkpoints if kept.complete]
    screen.print(
        output.facts(
            [
                ("run", result.run_id),
                ("status", view.status),
                ("step", view.last_step),
                ("took", output.duration((view.ended or view.alive) - view.created)),
                ("checkpoints", ", ".join(steps) or "none"),
            ]
        )
    )
    rows = [(key, output.number(of["last"]), output.number(of["best"])) for key, of in view.metrics.items()]
    if rows:
        screen.print()
        screen.print(output.table("Metrics", ("metric", "last", "best"), rows, right=("last", "best")))
    print_backends(screen, view)
    place = "" if storage.uri == os.path.abspath("runs") else f" --storage {shlex.quote(storage.uri)}"
    # not through the console: a command that is broken over lines can't be copied
    typer.echo(f"\nSee it:  ray-tracking ui{place}")
    typer.echo(f"Again:   ray-tracking runs show {shlex.quote(result.run_id)}{place}")
