"""HyperBand on a real Ray cluster: trials wait for each other off their workers, and go on where they were."""

from __future__ import annotations

from pathlib import Path

import pyarrow.compute as pc
import pytest

from ray_tracking import TrainingManager
from ray_tracking.journal.reader import JournalReader
from ray_tracking.runs.store import RunStore
from ray_tracking.runs.sweep import SweepStore
from ray_tracking.storage import Storage
from tests.runtime.sweep import functions
from tests.runtime.sweep.test_sweep import alive, config, wait_until_gone

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_the_best_go_on_from_where_they_waited(tmp_path, workers):
    points = [{"x": x} for x in (0.9, 0.4, 0.8, 0.7, 0.6)]
    made = config(
        tmp_path,
        {
            "space": {"x": {"uniform": [0, 1]}},
            "points": points,
            "num_samples": 5,
            "max_concurrent": 2,
            "searcher": "bohb",  # proposes these points first
            "scheduler": {"name": "hyperband", "max_reports": 4, "reduction_factor": 2},
        },
        **{"scaling.workers": workers, "training.default.save_on_epoch_end": False},
        params={"epochs": 9, "started": str(tmp_path / "started")},
    )
    before = alive()
    result = TrainingManager(made, run_id="h").sweep(functions.valley)
    wait_until_gone(before)
    # A bracket of four (compared after 1 and 2 reports), and the first of one of three (compared after 2).
    trials = SweepStore(RunStore(Storage.open(tmp_path)), "h").load()
    reports = {trial.number: trial.reports for trial in trials}
    assert reports == {1: 1, 2: 4, 3: 1, 4: 2, 5: 4}
    milestones = {trial.number: [each.reports for each in trial.milestones] for trial in trials}
    assert milestones == {1: [1], 2: [1, 2, 4], 3: [1], 4: [1, 2], 5: [2, 4]}
    assert [trial.reason for trial in result.trials] == [
        f"stopped by hyperband after {reports[n]} report{'s' * (reports[n] > 1)}" for n in range(1, 6)
    ]
    assert [trial.status for trial in result.trials] == ["stopped"] * 5
    assert result.best is not None
    assert result.best.trial == 2
    runs = RunStore(Storage.open(Path(result.path).parent))
    per_report = 2 // workers
    for trial in result.trials:
        attempts = runs.load(trial.run_id).attempts
        for attempt in attempts[1:]:
            assert attempt.resumed_from_step is not None
            assert attempt.resumed_from_step in (per_report, 2 * per_report)
        table = JournalReader(runs.directory(trial.run_id)).effective()
        table = table.filter(pc.equal(table["key"], "val/loss"))
        assert table["step"].to_pylist() == [per_report * (n + 1) for n in range(reports[trial.trial])]
        assert table["attempt"].to_pylist() == sorted(table["attempt"].to_pylist())
    assert len(runs.load("h.trial-002").attempts) > 1  # it has waited at least once
