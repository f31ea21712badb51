"""What loading a checkpoint gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelCheckpoint:
    """The weights of one checkpoint. `path` is its folder on storage, `metrics` what was saved with it."""

    model_state: Any
    epoch: int = 0
    step: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    path: str = ""


@dataclass(frozen=True, slots=True)
class TrainingCheckpoint(ModelCheckpoint):
    """Everything of one checkpoint, as state dicts with their tensors in CPU memory; what was not saved is
    None.

    `objects` holds every state by the name it was saved under (model, optimizer and scheduler too);
    `rng` the random states of this rank, None if that rank was not part of the save.
    `rank` and `world_size` are those of the save that the rank-specific states come from.
    """

    optimizer_state: Any = None
    scheduler_state: Any = None
    objects: Mapping[str, Any] = field(default_factory=dict)
    rng: Mapping[str, Any] | None = None
    rank: int = 0
    world_size: int = 1
