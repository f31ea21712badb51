"""What `TrainingManager.sweep` returns and tells while it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ray_tracking.checkpoint.manifest import CheckpointInfo
from ray_tracking.runs.sweep import TrialRecord


@dataclass(frozen=True, slots=True)
class TrialResult:
    """A trial that has ended. `status` is completed, stopped (early), failed or interrupted.

    `value` is the best that the metric reached, `metrics` {key: {last, best}}.
    """

    trial: int
    run_id: str
    status: str
    reason: str | None
    params: Mapping[str, Any]
    value: float | None = None
    metrics: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    best_checkpoint: CheckpointInfo | None = None


@dataclass(frozen=True, slots=True)
class SweepResult:
    """A finished sweep: its trials in order, and the best of them, None if none got to a value."""

    sweep_id: str
    status: str
    path: str
    metric: str
    mode: str
    trials: Sequence[TrialResult] = ()
    best: TrialResult | None = None


class SweepProgress(NamedTuple):
    """Where a sweep is. `standing`: of the trials under way, by number, step and newest metrics. Times in seconds."""

    sweep_id: str
    metric: str
    mode: str
    trials: Sequence[TrialRecord]
    total: int
    standing: Mapping[int, Mapping[str, Any]]
    elapsed: float
    left: float | None


def time_left(trials: Sequence[TrialRecord], total: int, at_once: int, now: float) -> float | None:
    """By how long the trials that have ended took; None before the first has."""
    took = [
        trial.ended - trial.started
        for trial in trials
        if trial.ended is not None and trial.started is not None and trial.status.is_over
    ]
    if not took:
        return None
    mean = sum(took) / len(took)
    running = [now - trial.started for trial in trials if trial.started is not None and not trial.status.is_over]
    waiting = total - len(took) - len(running)
    rest = sum(max(mean - age, 0.0) for age in running) + max(waiting, 0) * mean
    return rest / max(at_once, 1)
