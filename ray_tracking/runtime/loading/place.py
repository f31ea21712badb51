"""Where a loader stands, and what it hands out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True, slots=True)
class Place:
    """A position in an epoch.

    `turn` counts the passes over the data in one epoch, from 0: a validation set may be gone through several times.
    `consumed`: units that all ranks together have been given in this pass. `marks`: what the source of the data wants
    to find again when it is opened here (JSON-able, but for tensors in the state of a dataset).
    """

    seed: int
    epoch: int = 0
    turn: int = 0
    consumed: int = 0
    finished: bool = False
    marks: Mapping[str, Any] = field(default_factory=dict)

    @property
    def number(self) -> int:
        """What a sampler's or dataset's `set_epoch` is told: it counts on in loops that know no epochs."""
        return self.epoch + self.turn


class Handed(NamedTuple):
    """A batch, and the position once it is handed out. `finished`: no batch comes after it in this pass."""

    batch: Any
    consumed: int
    finished: bool
    marks: Mapping[str, Any]
