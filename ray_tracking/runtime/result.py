"""What `TrainingManager.fit` returns and tells while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ray_tracking.checkpoint.manifest import CheckpointInfo


class Progress(NamedTuple):
    """Where a run is. `phase` is starting, training or finishing; `elapsed` is in seconds since `fit` began."""

    run_id: str
    phase: str
    step: int
    total_steps: int | None
    epoch: int
    total_epochs: int | None
    loss_key: str | None
    loss: float | None
    elapsed: float
    backends: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class RunResult:
    """A finished run.

    `metrics` is {key: {last, best}}, `backends` {name: {state, delivered, pending, location, error}}.
    """

    run_id: str
    status: str
    path: str
    metrics: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    best_checkpoint: CheckpointInfo | None = None
    latest_checkpoint: CheckpointInfo | None = None
    attempts: int = 1
    last_step: int = 0
    backends: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
