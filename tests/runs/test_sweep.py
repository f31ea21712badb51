from __future__ import annotations

import math
from pathlib import Path

import pytest

from ray_tracking.errors import NameRefusedError, RayTrackingError, UsageError
from ray_tracking.runs.store import RunStore, sweep_of, trial_run_id
from ray_tracking.runs.sweep import SweepStore, TrialRecord, TrialStatus, best_of, ranking
from ray_tracking.storage import Storage


@pytest.fixture
def store(tmp_path: Path) -> SweepStore:
    return SweepStore(RunStore(Storage.open(tmp_path)), "s")


def test_a_trials_run_lies_in_the_folder_of_its_sweep(tmp_path):
    runs = RunStore(Storage.open(tmp_path))
    assert trial_run_id("s", 7) == "s.trial-007"
    assert runs.directory("s.trial-007").root == f"{tmp_path}/s/s.trial-007"
    assert runs.directory("s.trial-7").root == f"{tmp_path}/s.trial-7"
    with pytest.raises(NameRefusedError):
        runs.directory("../x.trial-001")
    with pytest.raises(NameRefusedError):
        runs.directory("tensorboard.trial-001")


@pytest.mark.parametrize(
    ("run_id", "sweep"),
    [
        ("s.trial-001", "s"),
        ("a.b.trial-1234", "a.b"),
        ("s.trial-01", None),
        ("s.trial-001x", None),
        (".trial-001", None),
        ("s", None),
    ],
)
def test_which_runs_are_trials_their_names_say(run_id, sweep):
    assert sweep_of(run_id) == sweep


def test_records_are_read_back_in_order(store):
    trials = [
        TrialRecord(2, {"lr": 0.1}, TrialStatus.FAILED, "boom", told=4, told_error=True, value=math.inf),
        TrialRecord(1, {"a": {"b": [1, 2]}}, suggested=1, started=3.5),
    ]
    for trial in trials:
        store.save(trial)
    assert store.load() == [trials[1], trials[0]]


def test_a_damaged_record_is_named(store, tmp_path):
    store.save(TrialRecord(1, {}))
    file = tmp_path / "s" / "s.trial-001" / "trial.json"
    file.write_text(file.read_text()[:30])
    with pytest.raises(RayTrackingError, match=r"s\.trial-001 is damaged"):
        store.load()


def test_what_a_sweep_is_its_file_says(store, tmp_path):
    with pytest.raises(UsageError, match="'s' is no sweep"):
        store.aim()
    store.create("loss", "max", {"name": "x"})
    assert (store.aim(), store.config(), store.exists()) == (("loss", "max"), {"name": "x"}, True)
    file = tmp_path / "s" / "sweep.json"
    file.write_text(file.read_text().replace('"schema": 1', '"schema": 9'))
    with pytest.raises(RayTrackingError, match="newer version"):
        store.aim()
    file.write_text("{")
    with pytest.raises(RayTrackingError, match="damaged"):
        store.config()


def trial(number: int, value: float | None, status: TrialStatus = TrialStatus.COMPLETED) -> TrialRecord:
    return TrialRecord(number, {}, status, value=value)


def test_the_ranking_knows_nan_ties_and_failures():
    failed = trial(1, 0.1, TrialStatus.FAILED)
    trials = [failed, trial(2, 0.5), trial(3, math.nan), trial(4, None), trial(5, 0.5), trial(6, 0.2)]
    assert [each.number for each in ranking(trials, "min")] == [6, 2, 5, 1]
    assert [each.number for each in ranking(trials, "max")] == [2, 5, 6, 1]
    assert best_of([failed], "min") is None
    assert best_of([], "min") is None
