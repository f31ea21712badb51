"""`ray-tracking resume RUN`: goes on with a run that failed, was ended or lost its driver, from its storage alone."""

from __future__ import annotations

from typing import Annotated

import typer

from ray_tracking.cli.options import Address, ConfigFile, Debug, Environment, Run, Settings, StorageUri, open_store
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
    debug: Debug = False,
) -> None:
    """Go on with a run that was not completed, from its storage.

    -c and --env only say where the runs lie. --set changes the recorded config: scaling.workers=4, say.
    """
    require("ray", "ray", "torch")
    from ray_tracking.cli.progress import ProgressView
    from ray_tracking.cli.train import print_result
    from ray_tracking.config import parse_assignments
    from ray_tracking.log import configure
    from ray_tracking.monitoring.select import select_run
    from ray_tracking.runs.resuming import check_resumable

    store = open_store(storage, config, env)
    run_id = select_run(store, run)
    check_resumable(store.load(run_id), has_function=target is not None)
    overrides = parse_assignments(settings or [])
    configure("debug" if debug else None)

    from ray_tracking.runtime.target import load_target, ship_by_value
    from ray_tracking.runtime.trainer import TrainingManager

    loaded = load_target(target) if target is not None else None
    if loaded is not None:
        ship_by_value(loaded)
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
