"""PBT on a real Ray cluster: a bad trial takes over a good one's state, and goes on with other params."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
import torch

from ray_tracking import TrainingManager
from ray_tracking.checkpoint import CheckpointStore
from ray_tracking.errors import UsageError
from ray_tracking.journal.reader import JournalReader
from ray_tracking.records import Kind
from ray_tracking.runs.store import RunStore
from ray_tracking.runs.sweep import SweepStore, TrialRecord
from ray_tracking.runtime.sweep.resuming import resume_sweep
from ray_tracking.storage import Storage
from tests.runtime.sweep import functions
from tests.runtime.sweep.drivers import ended, start_driver, wait_for
from tests.runtime.sweep.test_sweep import alive, config, wait_until_gone

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def search(storage: Path, workers: int, scheduler: str = "pbt", epochs: int = 5) -> Any:
    started = storage / "started"
    started.mkdir()
    space = {"lr": {"loguniform": [1e-6, 1e-2]}}
    if workers > 1:  # groups start one after the other, and each takeover starts one anew
        epochs *= 5
    return config(
        storage,
        {
            "space": space,
            "points": [{"lr": 3e-3}, {"lr": 1e-6}],
            "num_samples": 2,
            "max_concurrent": 2,
            "metric": "val/accuracy",
            "mode": "max",
            "scheduler": {
                "name": scheduler,
                "quantile_fraction": 0.5,
                "mutate": ["lr"],
                "interval_reports": 1 if workers == 1 else 8,
            },
        },
        **{"scaling.workers": workers, "training.default.save_total_limit": 50, "training.default.save_steps": None},
        params={"epochs": epochs, "width": 8, "batch_size": 64, "started": str(started)},
    )


@pytest.mark.parametrize(
    ("scheduler", "workers"),
    [("pbt", 1), pytest.param("pbt", 2, marks=pytest.mark.slow), pytest.param("pb2", 1, marks=pytest.mark.slow)],
)
def test_a_bad_trial_takes_over_the_weights_of_a_good_one(tmp_path, scheduler, workers):
    before = alive()
    result = TrainingManager(search(tmp_path, workers, scheduler), run_id="p").sweep(functions.population)
    wait_until_gone(before)
    assert [trial.status for trial in result.trials] == ["completed"] * 2
    runs = RunStore(Storage.open(tmp_path))
    good, bad = SweepStore(runs, "p").load()
    assert bad.takeovers
    assert bad.takeovers[0]["run_id"] == "p.trial-001"
    assert bad.takeovers[0]["before"] == {"lr": 1e-6}
    for trial in (good, bad):
        check_takeovers(runs, trial, tmp_path / "started")
        check_history(runs.directory(f"p.trial-{trial.number:03d}"))
    assert bad.value is not None
    assert bad.value > 0.5  # with its own rate it learns nothing


def check_takeovers(runs: RunStore, trial: TrialRecord, started: Path) -> None:
    """What was restored is, bit for bit, the donor's checkpoint that the records name; the rates are the new ones."""
    run_id = f"p.trial-{trial.number:03d}"
    attempts = runs.load(run_id).attempts
    assert len(attempts) == 1 + len(trial.takeovers)
    for takeover, before, attempt in zip(trial.takeovers, attempts[:-1], attempts[1:], strict=True):
        assert before.reason == f"takes over the state of {takeover['run_id']}"
        note = json.loads(runs.directory(run_id).read_bytes(f"takeover-{takeover['number']:03d}.json"))
        assert note["run_id"] == takeover["run_id"] != run_id
        assert note["taken_step"] == takeover["step"] == attempt.resumed_from_step
        found = torch.load(started / f"{run_id}-{attempt.number}.pt")
        assert found["step"] == note["taken_step"]
        store = CheckpointStore(runs.directory(takeover["run_id"]))
        donor = store.inspect(note["from_folder"]).info
        assert donor is not None
        assert not donor.pinned
        weights = store.load(donor).model_state
        assert weights is not None
        assert set(weights) == set(found["weights"])
        assert all(torch.equal(weights[name], found["weights"][name]) for name in weights)
        assert found["rates"] == [found["lr"]]
        assert 1e-6 <= found["lr"] <= 1e-2
        assert found["lr"] != takeover["before"]["lr"]


def check_history(directory: Storage) -> None:
    """One effective history, no step twice; the takeovers that still count are told in it."""
    table = JournalReader(directory).effective()
    steps = table.filter(pc.equal(table["key"], "val/accuracy"))["step"].to_pylist()
    assert steps == sorted(set(steps))
    texts = [row for row in JournalReader(directory).effective_records([Kind.TEXT]) if row.key == "sweep/takeover"]
    assert len(texts) == len({note.step for note in texts})


@pytest.mark.slow
def test_a_population_whose_driver_was_killed_goes_on(tmp_path):
    """After a takeover was decided: it is made, once, and the trial keeps the params that came with it."""
    made = search(tmp_path, 1, epochs=12)
    driver = start_driver(
        tmp_path,
        "tests.runtime.sweep.functions:population",
        {key: made.to_dict()[key] for key in ("params", "training", "sweep")},
        "p",
    )
    runs = RunStore(Storage.open(tmp_path / "runs"))
    store = SweepStore(runs, "p")
    with ended(driver):
        wait_for(lambda: runs.exists("p") and any(trial.takeovers for trial in store.load()), driver)
    before = {trial.number: trial for trial in store.load()}
    result = resume_sweep(runs, "p", train=functions.population)
    assert [trial.status for trial in result.trials] == ["completed"] * 2
    for trial in store.load():
        known = before[trial.number].takeovers
        assert trial.takeovers[: len(known)] == known
        notes = [name for name in runs.directory(f"p.trial-{trial.number:03d}").list() if "takeover" in name.name]
        assert len(notes) == len(trial.takeovers)
        check_history(runs.directory(f"p.trial-{trial.number:03d}"))


def test_a_population_that_can_not_run_side_by_side_is_refused(tmp_path):
    made = search(tmp_path, 2)
    wide = made.model_copy(update={"sweep": made.sweep.model_copy(update={"num_samples": 3})})
    with pytest.raises(UsageError, match="3 trials side by side, and 2 can run at a time"):
        TrainingManager(wide, run_id="q").sweep(functions.population)
