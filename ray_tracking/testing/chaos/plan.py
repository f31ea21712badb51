"""What is done to a run and when, drawn once from a seed; and what is noted of each. Pure.

In: what may be struck, how often, how long the run is. Out: `Strike`s, in the order in which they come.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from ray_tracking.errors import RunFailedError

_FROM, _TO = 0.05, 0.85
"""The share of the run's steps in which it is struck: the journal tells of a step a little after it was done."""
_FURTHER = 10.0
"""Steps. Records come in bursts, many with a save: without these the strikes would too."""
STEPS_PER_STRIKE = 4
"""The fewest steps for each: they are few enough to be over before the next strike is due, even so."""


class Part(StrEnum):
    """What of a run, or of what is around it, is struck."""

    WORKER = "worker"
    DRIVER = "driver"
    TRACKER = "tracker"
    WRITER = "writer"
    NODE = "node"
    HEAD = "head"
    TENSORBOARD = "tensorboard"
    MLFLOW = "mlflow"
    WANDB = "wandb"
    DISK = "disk"

    @property
    def restarts_workers(self) -> bool:
        """Whether training goes on from a checkpoint afterwards, as a new attempt."""
        return self in (Part.WORKER, Part.NODE) or self.ends_driver

    @property
    def ends_driver(self) -> bool:
        """Whether the command is gone afterwards, and is to be started again."""
        return self in (Part.DRIVER, Part.HEAD)

    @property
    def is_outage(self) -> bool:
        """Whether it is taken away for a while and given back, not killed."""
        return self in BACKENDS or self is Part.DISK


BACKENDS = (Part.TENSORBOARD, Part.MLFLOW, Part.WANDB)
GROUPS = {"backend": BACKENDS, "all": tuple(Part)}
"""Words that stand for several parts: those of them that the run has and that can be struck here."""
BY_DEFAULT = (Part.WORKER, Part.TRACKER, Part.DRIVER, Part.WRITER)
"""What needs nothing but the run itself."""


@dataclass(frozen=True, slots=True)
class Strike:
    """One strike to come: once the journal has `step`, and the time of `further` steps after that, so that it falls
    anywhere, also inside a step.

    `pick`, from 0 to below 1, says which of several processes of the part it is.
    """

    number: int
    part: Part
    step: int
    further: float
    pick: float


@dataclass(frozen=True, slots=True)
class Hit:
    """A strike that was carried out: the process was there, and then it was not. `time` is Unix time.

    `attempt` was under way; `complete` checkpoints were found right after, `problems` are those that do not verify.
    """

    strike: Strike
    time: float
    attempt: int
    pids: tuple[int, ...]
    complete: int
    problems: tuple[str, ...]
    outage: float | None = None
    """Seconds for which it was away, None for what was killed."""
    noticed: str | None = None
    """How the run showed that something was away."""


def unfold(words: Iterable[str]) -> tuple[list[Part], list[Part]]:
    """(parts asked for by their own name, parts meant by a group), each once. Raises ValueError naming a wrong word."""
    named: list[Part] = []
    grouped: list[Part] = []
    for word in words:
        if word in GROUPS:
            grouped += GROUPS[word]
        else:
            named.append(Part(word))
    return list(dict.fromkeys(named)), [part for part in dict.fromkeys(grouped) if part not in named]


def draw(parts: Sequence[Part], times: int, total_steps: int, seed: int) -> list[Strike]:
    """`times` strikes spread over a run of `total_steps`, one at random in each of as many equal stretches of it.

    Every part comes equally often, give or take one, in random order. Raises RunFailedError if the run is too short.
    """
    if total_steps < times * STEPS_PER_STRIKE:
        fewest = times * STEPS_PER_STRIKE
        raise RunFailedError(
            f"The undisturbed run logged metrics up to step {total_steps}: too short for {times} faults.",
            hint=f"Make it longer, {fewest} steps at least (--set params.epochs=...), or lower --times.",
        )
    dice = random.Random(seed)
    kinds: list[Part] = []
    while len(kinds) < times:
        kinds += dice.sample(parts, len(parts))
    first, stretch = _FROM * total_steps, (_TO - _FROM) * total_steps / times
    return [
        Strike(
            number,
            part,
            max(1, round(first + stretch * (number - 1 + dice.random()))),
            dice.uniform(0, _FURTHER),
            dice.random(),
        )
        for number, part in enumerate(kinds[:times], start=1)
    ]
