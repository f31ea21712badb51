"""What a sweep's hub keeps of trials that have ended: its memory and open files, as it tracks one after the other.

Run: python -m tests.runtime.sweep.hub_memory STORAGE TRIALS
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
from pathlib import Path

import cloudpickle

from ray_tracking.config import get_config
from ray_tracking.records import Kind
from ray_tracking.runs.store import trial_run_id
from ray_tracking.runtime.sweep.hub import SweepHub
from ray_tracking.storage import Storage
from ray_tracking.tracking.spec import TrackerSpec, local_directory
from ray_tracking.tracking.transport import pack

_PAGE = os.sysconf("SC_PAGE_SIZE")
STEPS = 20


def resident() -> int:
    """Bytes."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def make_hub(storage: Path) -> SweepHub:
    config = get_config(
        "testing",
        {
            "storage": str(storage),
            "name": "memory",
            "experiment_tracking.tensorboard.enabled": True,
            "experiment_tracking.mlflow": {"enabled": True, "experiment_name": "memory"},
            "experiment_tracking.wandb": {"enabled": True, "mode": "offline", "project": "memory"},
            "experiment_tracking.delivery.final_secs": 60,
        },
    )
    opened = Storage.open(storage)
    tracking = config.experiment_tracking.to_dict()
    of_sweep = {**tracking, "tensorboard": {"enabled": False}, "wandb": {"enabled": False}}
    trial = TrackerSpec(
        "",
        "memory",
        opened.uri,
        local_directory(opened),
        tracking=tracking,
        config=config.to_dict(),
        monitor="loss",
    )
    sweep = TrackerSpec(
        "memory", "memory", opened.uri, local_directory(opened), tracking=of_sweep, config={}, monitor="loss"
    )
    return SweepHub(sweep.to_json(), trial.to_json(), {}, cloudpickle.dumps(None))


def track_one(hub: SweepHub, number: int) -> None:
    run_id = trial_run_id("memory", number)
    hub.expect(f"t{number}", run_id)
    begun = hub.begin(f"t{number}", {"lr": number / 1000}, b"", is_ready=True)
    attempt = begun.attempt
    assert attempt is not None
    now = time.time()
    rows = [(0, Kind.ATTEMPT.value, -1, now, {"attempt": b""})]
    rows += [
        (step, Kind.SCALAR.value, step, now, {f"metric/{n}": step / (n + 1) for n in range(10)} | {"loss": 1 / step})
        for step in range(1, STEPS + 1)
    ]
    hub.append(run_id, 0, attempt, pack(rows))
    hub.rest(run_id, begun.since)
    hub.end(run_id, "completed", "completed")
    hub.note(number, {"loss": 1 / number})


def main(storage: str, trials: str) -> None:
    hub = make_hub(Path(storage))
    hub.ready()
    for number in range(1, int(trials) + 1):
        track_one(hub, number)
        figures = {
            "trials": number,
            "rss": resident(),
            "files": len(os.listdir("/proc/self/fd")),
            "threads": threading.active_count(),
        }
        print(json.dumps(figures), flush=True)
    hub.close("completed", "completed")


if __name__ == "__main__":
    main(*sys.argv[1:])
