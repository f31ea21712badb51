"""`ray-tracking resume RUN`: goes on with a run that failed, was ended or lost its driver, from its storage alone."""

from __future__ import annotations

from typing import Annotated

import typer

from ray_tracking.cli.options import Address, ConfigFile, Debug, Environment, Run, Settings, StorageUri, open_store
from ray_tracking.cli.supervising import Retries, driver_command, supervise
from ray_tracking.cli.sweep import resume_sweep
from ray_tracking.extras import require


def resume(
    run: Run = "latest",
    target: Annotated[
        str | None,
        typer.Option("--target", metavar="TARGET", help="The training function, if it is not where it was."),
    ] = None,
    settings: Settings = None,
    config: ConfigFile = None,
    env: Environment = None,
    storage: StorageUri = None,
    address: Address = None,
    retries: Retries = 0,
    debug: Debug = False,
) -> None:
    """Go on with a run or sweep that was not completed.

    -c and --env only say where the runs lie. --set changes the recorded config: scaling.workers=4, say.
    """
    require("ray", "ray", "torch")
    from ray_tracking.cli.progress import ProgressView
    from ray_tracking.cli.train import print_result
    from ray_tracking.config import parse_assignments
    from ray_tracking.log import configure
    from ray_tracking.monitoring.select import select_run
    from ray_tracking.runs.resuming import check_resumable
    from ray_tracking.runs.sweep import SweepStore

    store = open_store(storage, config, env)
    run_id = select_run(store, run)
    check_resumable(store.load(run_id), has_function=target is not None)
    overrides = parse_assignments(settings or [])
    configure("debug" if debug else None)
    if retries:
        where = [("-c", config), ("--env", env), ("--storage", storage), ("--address", address)]
        given = [*where, ("--target", target), ("--set", settings), ("--debug", debug)]
        command = driver_command("resume", run_id, options=given)
        raise typer.Exit(supervise(command, store, run_id, retries))

    from ray_tracking.runtime.target import load_target, ship_by_value
    from ray_tracking.runtime.trainer import TrainingManager

    loaded = load_target(target) if target is not None else None
    if loaded is not None:
        ship_by_value(loaded)
    if SweepStore(store, run_id).exists():
        resume_sweep(store, run_id, None if loaded is None else loaded.function, overrides, address)
        return
    with ProgressView() as view:
        result = TrainingManager.resume(
            run_id,
            store.storage.uri,
            train=None if loaded is None else loaded.function,
            overrides=overrides,
            address=address,
            observer=view.report,
        )
    print_result(result, store.storage)
