"""The example sweep: that its config says what it means, and (slow) that it finds better params than it begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ray_tracking.config import get_config
from ray_tracking.journal.reader import JournalReader
from ray_tracking.monitoring.report.sweep import sweep_report
from ray_tracking.monitoring.report.sweep_facts import sweep_facts
from ray_tracking.runs.store import RunStore
from ray_tracking.storage import Storage

FILE = Path(__file__).parents[2] / "configs" / "sweep.yaml"


def test_what_is_tried_first_is_what_a_run_without_a_search_would_have() -> None:
    config = get_config(file=FILE)
    assert config.sweep is not None
    (point,) = config.sweep.points
    assert {key: config.params[key] for key in point} == point
    assert set(point) == set(config.sweep.space)
    assert config.sweep.num_samples == 12


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_it_beats_the_default_and_mlflow_has_what_the_journals_have(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    from ray_tracking import TrainingManager
    from ray_tracking.examples.digits import train

    result = TrainingManager(get_config(file=FILE, overrides={"storage": str(tmp_path)})).sweep(train)
    store = RunStore(Storage.open(tmp_path))
    facts = sweep_facts(store, result.sweep_id, 0.0)
    assert facts.default is not None
    assert facts.default.number == 1
    assert result.best is not None
    assert result.best.value is not None
    assert facts.default.value is not None
    assert result.best.value >= facts.default.value + 0.008  # three of 360 images
    assert len(sweep_report(store, result.sweep_id)) > 1_000_000

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = [run for found in client.search_experiments() for run in client.search_runs([found.experiment_id])]
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = {run.info.run_name: run for run in runs if "mlflow.parentRunId" in run.data.tags}
    assert (len(parents), len(children)) == (1, 12)
    for trial in result.trials:
        child = children[f"digits-sweep trial-{trial.trial:03d}"]
        assert child.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
        assert {key: child.data.params[key] for key in trial.params} == {
            key: str(value) for key, value in trial.params.items()
        }
        last = _last(store, trial.run_id)
        assert {key: child.data.metrics[key] for key in last} == last


def _last(store: RunStore, run_id: str) -> dict[str, Any]:
    return {row["key"]: row["value"] for row in JournalReader(store.directory(run_id)).effective().to_pylist()}
