"""A sweep of many short trials on a cluster of its own: prints what the hub holds as trials end, and what still lives
when the sweep is over, as Ray's state API has it. Arguments: storage, number of trials.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import ray
from ray.util.state import list_actors, list_placement_groups

from ray_tracking import TrainingManager
from ray_tracking.runtime.sweep.result import SweepProgress
from tests.runtime.sweep import functions
from tests.runtime.sweep.test_sweep import config

_OF_THE_CLUSTER = ("_AutoscalingCoordinatorActor", "JobSupervisor")


def hub_process() -> Path:
    """Its folder in /proc."""
    return next(each.parent for each in Path("/proc").glob("[0-9]*/cmdline") if b"ray::SweepHub" in each.read_bytes())


def main(storage: str, trials: int) -> None:
    ray.init(address="local", num_cpus=4, include_dashboard=True, logging_level="ERROR")
    seen: dict[int, None] = {}

    def look(progress: SweepProgress) -> None:
        over = sum(trial.status.is_over for trial in progress.trials)
        if over % 8 or over in seen or not over:
            return
        seen[over] = None
        hub = hub_process()
        rss = int((hub / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        held = {name: len(list((hub / folder).iterdir())) for name, folder in (("files", "fd"), ("threads", "task"))}
        print(json.dumps({"trials": over, "rss": rss, **held}), flush=True)

    backends = {f"experiment_tracking.{name}.enabled": True for name in ("tensorboard", "mlflow", "wandb")}
    search = {"space": {"x": {"uniform": [0, 1]}}, "num_samples": trials, "max_concurrent": 4}
    made = config(Path(storage), search, **backends, params={"epochs": 1})
    result = TrainingManager(made, run_id="short").sweep(functions.valley, observer=look)
    assert [trial.status for trial in result.trials] == ["completed"] * trials
    end = time.monotonic() + 30
    while (left := living()) and time.monotonic() < end:
        time.sleep(1)
    print(json.dumps({"left": left}), flush=True)


def living() -> list[str]:
    here = ray.get_runtime_context().gcs_address  # there may be other clusters on this machine
    actors = [actor.class_name for actor in list_actors(here, limit=1000) if actor.state != "DEAD"]
    groups = [
        f"placement group {group.placement_group_id}"
        for group in list_placement_groups(here, limit=1000)
        if group.state != "REMOVED"
    ]
    return [name for name in actors if name not in _OF_THE_CLUSTER] + groups


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
