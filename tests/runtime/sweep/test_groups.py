"""Sweeps whose trials have two workers each, on a real Ray cluster."""

from __future__ import annotations

import signal
from pathlib import Path

import pyarrow.compute as pc
import pytest

from ray_tracking import TrainingManager
from ray_tracking.checkpoint import CheckpointStore
from ray_tracking.journal.reader import JournalReader
from ray_tracking.runs.store import RunStore
from ray_tracking.runs.sweep import SweepStore
from ray_tracking.runtime.sweep.result import SweepResult
from ray_tracking.runtime.sweep.resuming import resume_sweep
from ray_tracking.storage import Storage
from tests.runtime.sweep import functions
from tests.runtime.sweep.drivers import ended, start_driver, wait_for
from tests.runtime.sweep.test_sweep import alive, config, wait_until_gone

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

HOW = ["raise", "kill", "nan", "ok"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> SweepResult:
    """Four trials of two workers: one raises, one is killed, one comes to NaN; one is stopped by a rule."""
    storage = tmp_path_factory.mktemp("groups")
    points = [{"x": round(0.1 * n, 1), "how": how} for n, how in enumerate(HOW)]
    space = {"x": {"uniform": [0, 1]}, "how": {"choice": ["ok", "raise", "kill", "nan"]}}
    before = alive()
    made = config(
        storage,
        {"space": space, "points": points, "num_samples": 4, "max_concurrent": 2, "stop": {"reports": 2}},
        **{"scaling.workers": 2},
    )
    result = TrainingManager(made, run_id="groups").sweep(functions.valley)
    wait_until_gone(before)
    return result


def test_what_fails_is_recorded_with_its_reason_and_a_stop_reaches_all_workers(mixed):
    reasons = {how: trial.reason for how, trial in zip(HOW, mixed.trials, strict=True)}
    assert [trial.status for trial in mixed.trials] == ["failed" if how != "ok" else "stopped" for how in HOW], reasons
    assert reasons["raise"].startswith("rank 0: ValueError: no good, with password=")
    assert "hunter2" not in reasons["raise"]
    assert "the worker process on " in reasons["kill"]
    assert "died: killed, out of memory, or crashed" in reasons["kill"]
    assert reasons["nan"] == "diverged: val/loss is nan at step 2"
    assert reasons["ok"] == "stopped after 2 reports, as sweep.stop.reports says"
    assert mixed.best is not None
    assert mixed.best.trial == 4


def test_each_trial_is_a_run_with_its_journal_and_whole_checkpoints(mixed):
    runs = RunStore(Storage.open(Path(mixed.path).parent))
    for trial in mixed.trials:
        record = runs.load(trial.run_id)
        assert [attempt.world_size for attempt in record.attempts] == [2]
        table = JournalReader(runs.directory(trial.run_id)).effective()
        steps = table.filter(pc.equal(table["key"], "val/loss"))["step"].to_pylist()
        assert steps[0] == 1
        assert len(steps) == len(set(steps)) == (1 if trial.params["how"] in ("raise", "kill") else 2)
        saved = CheckpointStore(runs.directory(trial.run_id)).checkpoints()
        assert [info.world_size for info in saved] == [2] * len(saved)
        # Whole, of the first epoch's end; where all ranks raised, also of what they had reached. What was being written
        # when a failing trial was ended may be missing.
        allowed = {"ok": ([1],), "raise": ([2], [1, 2])}.get(trial.params["how"], ([], [1]))
        assert [info.step for info in saved] in allowed, trial


@pytest.mark.slow
def test_an_interrupt_ends_all_workers_and_the_trials_go_on_from_their_checkpoints(tmp_path):
    before = alive()
    driver = start_driver(
        tmp_path,
        "tests.runtime.sweep.functions:valley",
        {
            "scaling": {"workers": 2},
            "params": {"pause": 3.0, "epochs": 8},
            "training": {"default": {"save_on_epoch_end": True}},
            "sweep": {"space": {"x": {"uniform": [0, 1]}}, "num_samples": 2, "max_concurrent": 2, "seed": 3},
        },
        "stopped",
    )
    runs = RunStore(Storage.open(tmp_path / "runs"))
    names = ["stopped.trial-001", "stopped.trial-002"]
    with ended(driver):
        wait_for(lambda: all(CheckpointStore(runs.directory(name)).checkpoints() for name in names), driver)
        driver.send_signal(signal.SIGINT)
        driver.wait(120)
    wait_until_gone(before)
    trials = SweepStore(runs, "stopped").load()
    assert [trial.status.value for trial in trials] == ["interrupted"] * 2
    result = resume_sweep(runs, "stopped", train=functions.valley)
    assert [trial.status for trial in result.trials] == ["completed"] * 2
    for name in names:
        first, second = runs.load(name).attempts
        assert first.resumed_from_step == -1
        assert second.resumed_from_step is not None
        assert second.resumed_from_step >= 1
        table = JournalReader(runs.directory(name)).effective()
        assert table.filter(pc.equal(table["key"], "val/loss"))["step"].to_pylist() == list(range(1, 9))
    wait_until_gone(before)
