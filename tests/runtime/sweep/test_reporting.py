from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ray_tracking.errors import UsageError
from ray_tracking.runs.store import RunStore
from ray_tracking.runtime.sweep.reporting import IS_LAST, REPORTS, TrialDivergedError, TuneReporter
from ray_tracking.storage import Storage
from tests.monitoring.builder import RunBuilder, scalars


@pytest.fixture
def told() -> list[dict[str, Any]]:
    """What is reported to Ray Tune."""
    return []


@pytest.fixture
def store(tmp_path) -> RunStore:
    return RunStore(Storage.open(tmp_path))


def resumed(store: RunStore, told: list[Any], step: int, metric: str = "val/loss") -> tuple[TuneReporter, Any]:
    """The reporter of a second attempt, which goes on from `step`, and its `log_metrics`."""
    RunBuilder(store, "r").log(scalars([2, 4, 6]))  # the value is 1 / step
    saver = SimpleNamespace(newest_step=-1)
    plain = lambda metrics, step=None: None  # noqa: E731
    run: Any = SimpleNamespace(log_metrics=plain, step=step, epoch=1, total_epochs=3, attempt=2, checkpoints=saver)
    sender: Any = SimpleNamespace(flush=lambda timeout: True)
    reporter = TuneReporter(metric, store.directory("r"), lambda result, _: told.append(result))
    return reporter, reporter.watch(run, sender)


def test_reports_are_counted_on_from_the_step_that_was_resumed(store, told):
    reporter, log_metrics = resumed(store, told, step=6)
    log_metrics({"train/loss": 1.0})
    log_metrics({"val/loss": 0.125})
    reporter.finish()
    assert told == [{"val/loss": 0.125, "step": 6, "epoch": 1, REPORTS: 3, IS_LAST: False}]


def test_a_trial_that_had_nothing_left_to_train_reports_what_it_had(store, told):
    """Interrupted between its last checkpoint and its end."""
    reporter, _ = resumed(store, told, step=6)
    reporter.finish()
    assert told == [{"val/loss": pytest.approx(1 / 6), "step": 6, "epoch": 1, REPORTS: 3, IS_LAST: False}]


def test_a_metric_that_was_never_logged_is_named(store, told):
    reporter, _ = resumed(store, told, step=6, metric="other")
    with pytest.raises(UsageError, match="never logged 'other'"):
        reporter.finish()
    assert told == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_ends_the_trial(store, told, value):
    _, log_metrics = resumed(store, told, step=6)
    with pytest.raises(TrialDivergedError, match="at step 6"):
        log_metrics({"val/loss": value})
    assert told == []
