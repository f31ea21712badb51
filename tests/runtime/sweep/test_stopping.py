from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from ray_tracking.config.sweep import SchedulerConfig, StopConfig, SweepConfig
from ray_tracking.runs.sweep import TrialRecord, TrialStatus
from ray_tracking.runtime.sweep import stopping
from ray_tracking.runtime.sweep.reporting import REPORTS
from ray_tracking.runtime.sweep.result import time_left
from ray_tracking.runtime.sweep.stopping import Reasons, StopRules, make_scheduler


def rules(mode: str = "min", since_gain: int = 0, **keys: Any) -> tuple[StopRules, Reasons]:
    reasons = Reasons()
    return StopRules(StopConfig(**keys), "m", mode, reasons, lambda: since_gain), reasons


def stopped_at(stopper: StopRules, values: list[float]) -> int | None:
    """Number of the report after which the trial ends."""
    for reports, value in enumerate(values, 1):
        if stopper("t", {"m": value, REPORTS: reports}):
            return reports
    return None


@pytest.mark.parametrize(
    ("keys", "values", "expected"),
    [
        ({}, [1.0] * 9, None),
        ({"reports": 3}, [1.0] * 9, 3),
        ({"plateau_reports": 2}, [3.0, 2.0, 2.0, 2.0, 1.0], 4),
        ({"plateau_reports": 2}, [3.0, 2.9, 2.8, 2.7, 2.6], None),
        ({"plateau_reports": 2, "plateau_min_delta": 0.5}, [3.0, 2.9, 2.8, 2.0], 3),
        ({"plateau_reports": 2, "mode": "max"}, [3.0, 4.0, 5.0, 1.0, 2.0], 5),
    ],
)
def test_when_a_trial_ends(keys, values, expected):
    stopper, reasons = rules(**keys)
    assert stopped_at(stopper, values) == expected
    assert ("t" in reasons.trials) == (expected is not None)


def test_when_the_sweep_ends(monkeypatch):
    assert not rules()[0].stop_all()
    assert not rules(trials_without_gain=3, since_gain=2)[0].stop_all()
    stopper, reasons = rules(trials_without_gain=3, since_gain=3)
    assert stopper.stop_all()
    assert reasons.sweep == "no new best in 3 trials"
    now = 1000.0
    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: now))
    stopper, reasons = rules(seconds=0.05)
    assert not stopper.stop_all()
    now += 0.06
    assert stopper.stop_all()
    assert reasons.sweep == "the sweep's 0.05 s are over"


class FakeTrial:
    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


@pytest.mark.parametrize(("name", "ended"), [("asha", 2), ("median", 4)])
def test_a_scheduler_ends_the_worst_and_notes_it(name, ended):
    """Trials come one after the other, each worse than the one before."""
    reasons = Reasons()
    config = SweepConfig(space={"a": 1}, scheduler=SchedulerConfig(name=name))
    scheduler = make_scheduler(
        config, "m", "min", reasons, seed=0, exploited=lambda exploit: {}, total=4, at_once=2, arrived=print
    )
    for number in range(1, 6):
        trial: Any = FakeTrial(f"t{number}")
        scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
        for reports in (1, 2):
            result = {"m": float(number), REPORTS: reports, "time_total_s": 1.0}
            decision = scheduler.on_trial_result(None, trial, result)  # type: ignore[arg-type]
            if decision == TrialScheduler.STOP:
                break
    assert min(reasons.trials) == f"t{ended}"
    assert reasons.trials[f"t{ended}"].startswith(f"stopped by {name} after ")


def test_the_time_left_is_by_what_trials_took():
    done = TrialRecord(1, {}, TrialStatus.COMPLETED, started=0.0, ended=10.0)
    running = TrialRecord(2, {}, TrialStatus.RUNNING, started=8.0)
    assert time_left([], 4, 2, 0.0) is None
    assert time_left([done, running], 4, 2, 12.0) == pytest.approx((6 + 20) / 2)
    assert time_left([done], 1, 2, 12.0) == 0.0
