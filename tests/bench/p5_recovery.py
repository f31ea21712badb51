"""A worker's death to the next new step, against the same Ray job untracked; steps lost against the save interval.

Two workers train the same model (6 M parameters, AdamW, DDP over gloo) in a job with this package and three backends,
and in a plain TorchTrainer that saves with torch.save and ray.train.report, as Ray's guide has it; same cluster, same
storage, same FailureConfig, same interval of Ray's health checks, a save every 20 steps. In each job one rank after the
other kills itself with SIGKILL right after a step; Ray starts the group again. The time is that from the kill to the
end of the first step beyond the one that was reached before: Ray's notice and restart, imports, finding, reading and
verifying the checkpoint, and the repetition of the steps since the save are all in it. A job has several kills, at
places that differ in how long ago the save was (the last one is one step before the next save), and jobs of both sides
take turns; the n-th kill of one side is held against the n-th of the other.
Steps lost are those that had been done and are done again, the worst of all kills.
The note below the table says where the time goes: until the training function runs again, until its state is restored,
until the first step. Everything else that runs on the machine is in both; on two cores it makes both slower alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.bench.measures import Measurement, Setup, Side, absolute, at_most, ratio
from tests.bench.recovery_jobs import WORKERS, Plan, Recovery, as_settings, read, tracked, untracked
from tests.bench.report import quantity
from tests.bench.workload import THREE_BACKENDS

_JOBS, _QUICK_JOBS = 4, 1
_EVERY = 20
_OFFSETS = (10, 15, 19)
"""Steps from the last save to the kill. The first leaves an asynchronous save time to be complete."""
_QUICK_OFFSETS = _OFFSETS[::2]
_BETWEEN = 2 * _EVERY
"""Steps from one kill's save to the next one's."""
_OURS, _PLAIN = "tracked", "untracked"


def measure(setup: Setup) -> list[Measurement]:
    import ray

    import ray_tracking.runtime.cluster  # noqa: F401  its settings of Ray, such as how often it looks, are for both
    from ray_tracking.runtime.console import quieten

    offsets = _QUICK_OFFSETS if setup.quick else _OFFSETS
    found: dict[str, list[Recovery]] = {_OURS: [], _PLAIN: []}
    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    quieten()
    try:
        for number in range(_QUICK_JOBS if setup.quick else _JOBS):
            for side in (_PLAIN, _OURS) if number % 2 else (_OURS, _PLAIN):
                folder = setup.folder / f"{side}-{number}"
                folder.mkdir()
                job_plan = plan(folder, offsets, first_rank=number)
                (_with if side == _OURS else _without)(job_plan, setup.folder)
                found[side] += read(job_plan)
    finally:
        ray.shutdown()
    return measurements(found[_OURS], found[_PLAIN], _EVERY)


def plan(folder: Path, offsets: Sequence[int], first_rank: int = 0) -> Plan:
    """Where a job's ranks are killed, in turn. Pure."""
    saves = range(_BETWEEN, _BETWEEN * (len(offsets) + 1), _BETWEEN)
    kills = tuple(
        (save + offset, (first_rank + number) % WORKERS)
        for number, (save, offset) in enumerate(zip(saves, offsets, strict=True))
    )
    return Plan(str(folder), _EVERY, kills[-1][0] + _EVERY // 2, kills)


def _with(job: Plan, folder: Path) -> None:
    from ray_tracking import TrainingManager

    config: dict[str, Any] = {
        "name": "bench",
        "storage": str(folder / "runs"),
        "scaling": {"workers": WORKERS},
        "failure": {"max_failures": -1},
        "experiment_tracking": THREE_BACKENDS,
        "training": {"default": {"save_steps": job.every, "save_at_end": False}},
        "params": {"plan": as_settings(job)},
    }
    TrainingManager(config).fit(tracked)


def _without(job: Plan, folder: Path) -> None:
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig

    TorchTrainer(
        untracked,
        train_loop_config=as_settings(job),
        scaling_config=ScalingConfig(num_workers=WORKERS),
        run_config=RunConfig(
            name=Path(job.folder).name,
            storage_path=str(folder / "plain"),
            failure_config=FailureConfig(max_failures=-1),
            checkpoint_config=CheckpointConfig(num_to_keep=3),
            logging_config=LoggingConfig("CRITICAL"),
        ),
    ).fit()


def measurements(ours: Sequence[Recovery], plain: Sequence[Recovery], every: int) -> list[Measurement]:
    """Pure."""
    sides = [
        Side(name, tuple(recovery.new for recovery in recoveries))
        for name, recoveries in ((_OURS, ours), (_PLAIN, plain))
    ]
    speed = ratio("P5", "a worker's death to the next new step, against untracked", "s", *sides, at_most(1.1))
    note = f"since the death, {_OURS}: {_where(ours)}; {_PLAIN}: {_where(plain)}."
    lost = Side("steps done again", (float(max(recovery.lost for recovery in ours)),))
    return [
        replace(speed, note=note),
        absolute("P5", f"steps lost, of {every} between two saves", "", lost, at_most(float(every))),
    ]


def _where(recoveries: Sequence[Recovery]) -> str:
    def middle(name: str) -> str:
        return quantity(statistics.median(getattr(recovery, name) for recovery in recoveries), "s")

    lost = max(recovery.lost for recovery in recoveries)
    return (
        f"the function runs after {middle('began')}, has restored after {middle('restored')}, its first step is done "
        f"after {middle('first')}; at most {lost} steps lost"
    )
