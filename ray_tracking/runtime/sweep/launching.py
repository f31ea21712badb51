"""Starts the hub with what it has to know: the sweep's own run, what every trial has in common, the function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cloudpickle
import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_tracking.checkpoint.keys import key_variables
from ray_tracking.config import Config, redact
from ray_tracking.config.sweep import WITH_STATE
from ray_tracking.errors import RayTrackingError
from ray_tracking.runtime.actor import forwarded_environment
from ray_tracking.runtime.context import Run
from ray_tracking.runtime.sweep.hub import SweepHub
from ray_tracking.runtime.worker import WorkerTask
from ray_tracking.tracking.spec import TrackerSpec

_HUB_THREADS = 64
_THREADS_PER_GROUP = 2
"""Calls of a trial of several workers that wait in the hub: rank 0's and the trial's own."""


def start_hub(config: Config, spec: TrackerSpec, train: Callable[[Run], Any], at_once: int) -> tuple[Any, int]:
    """The actor and the number of this session. `at_once`: trials at a time. Raises what TrackerService raises."""
    with_state = config.sweep is not None and config.sweep.scheduler.name in WITH_STATE
    changed: dict[str, Any] = {"monitor": spec.monitor, "mode": spec.mode}
    if with_state:  # what is reported at an epoch's end is to have its state
        changed["save_on_epoch_end"] = True
    rules = config.training.default.model_copy(update=changed)
    of_trial = config.model_copy(
        update={"sweep": None, "training": config.training.model_copy(update={"default": rules})}
    )
    environment = forwarded_environment(*key_variables(config.training.default.encryption))
    task = WorkerTask("", spec.storage, of_trial, train, None, environment)
    tracking = spec.tracking
    named = {
        "wandb": {**tracking["wandb"], "project": tracking["wandb"]["project"] or spec.name},
        "mlflow": {**tracking["mlflow"], "experiment_name": tracking["mlflow"]["experiment_name"] or spec.name},
    }
    lease_secs = config.failure.lease_secs
    trial = replace(
        spec,
        tracking={**tracking, **named},
        config=redact(of_trial.to_dict()),
        lease=None,
        lease_secs=lease_secs,
        patience=2 * lease_secs,  # the tracker of an earlier session may only just have died
    )
    # The sweep's own run is what groups the trials in MLflow; TensorBoard and W&B group them by themselves.
    of_sweep = {**tracking, **named, "tensorboard": {"enabled": False}, "wandb": {"enabled": False}}
    hub: Any = (
        ray.remote(SweepHub)
        .options(
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=_HUB_THREADS + (_THREADS_PER_GROUP * at_once if config.scaling.workers > 1 else 0),
            scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True),
        )
        .remote(
            replace(spec, tracking=of_sweep, config={**spec.config, "experiment_tracking": redact(of_sweep)}).to_json(),
            trial.to_json(),
            forwarded_environment(),
            cloudpickle.dumps(task),
            in_group=config.scaling.workers > 1,
            with_state=with_state,
        )
    )
    try:
        return hub, int(ray.get(hub.ready.remote()))
    except RayTaskError as error:
        ray.kill(hub)
        if isinstance(error.cause, RayTrackingError):
            raise error.cause from None
        raise
