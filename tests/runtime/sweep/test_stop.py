"""A sweep that is asked to stop: what is under way is saved, and gone on with by resume."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from ray_tracking import TrainingManager, get_config
from ray_tracking.runs import stopping
from ray_tracking.runs.record import Status
from ray_tracking.runs.store import RunStore
from ray_tracking.runs.sweep import SweepStore, TrialStatus
from ray_tracking.runtime.sweep.resuming import resume_sweep
from ray_tracking.storage import Storage
from tests.runtime.sweep import functions

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

EPOCHS = 20


def test_it_ends_in_order_and_goes_on(tmp_path: Path) -> None:
    store = RunStore(Storage.open(tmp_path))
    sweep = SweepStore(store, "asked")
    config = get_config(
        "testing",
        {
            "storage": str(tmp_path),
            "name": "valley",
            "params": {"epochs": EPOCHS, "pause": 0.3},
            "training.default.save_steps": 1000,
            "logging.level": "warning",
            "sweep": {"space": {"x": {"uniform": [0, 1]}}, "num_samples": 4, "max_concurrent": 2},
        },
    )
    stopping.request(store.directory("asked"))  # of an earlier session: it means nothing to this one

    def ask() -> None:
        end = time.monotonic() + 240
        while time.monotonic() < end:
            if any(store.directory(trial).exists("journal") for trial in store.trials("asked")):
                time.sleep(1.0)
                stopping.request(store.directory("asked"))
                return
            time.sleep(0.1)

    asking = threading.Thread(target=ask)
    asking.start()
    result = TrainingManager(config, run_id="asked").sweep(functions.valley)
    asking.join()

    assert result.status == Status.ABORTED
    record = store.load("asked")
    assert (record.status, record.attempts[-1].reason) == (Status.ABORTED, "stopped by request")
    stopped = {trial.number for trial in sweep.load() if trial.status is TrialStatus.INTERRUPTED}
    assert stopped
    assert {trial.reason for trial in sweep.load() if trial.number in stopped} == {"stopped by request"}
    assert sum(trial.status.is_over for trial in sweep.load()) < 4
    saved = {trial.trial: trial.best_checkpoint for trial in result.trials if trial.trial in stopped}
    assert all(checkpoint is not None and checkpoint.step > 0 for checkpoint in saved.values())

    final = resume_sweep(store, "asked", train=functions.valley)
    assert final.status == Status.COMPLETED
    assert [trial.status for trial in final.trials] == ["completed"] * 4
    for number, checkpoint in saved.items():
        assert checkpoint is not None
        assert store.load(sweep.run_id(number)).attempts[-1].resumed_from_step == checkpoint.step
