"""HyperBand's plan: which trials are compared with which, when, and how many of them go on. Pure.

In: how many trials, for how many reports at most. Out: brackets; each starts its trials alike, and at every rung lets
the best of them go on. (Li et al., Hyperband, JMLR 18, 2018, algorithm 1.)
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Rung:
    """After so many `reports`, so many go on: none after the last."""

    reports: int
    go_on: int


def plan(trials: int, max_reports: int, factor: int) -> list[tuple[int, tuple[Rung, ...]]]:
    """(trials, rungs) of brackets for so many trials in all; the last one may be cut short."""
    most = 0
    while factor ** (most + 1) <= max_reports:
        most += 1
    found: list[tuple[int, tuple[Rung, ...]]] = []
    left = trials
    while left > 0:
        for halvings in range(most, -1, -1):
            size = min(-(-(most + 1) * factor**halvings // (halvings + 1)), left)
            if size > 0:
                found.append((size, _rungs(size, max_reports, factor, halvings)))
            left -= size
    return found


def _rungs(size: int, max_reports: int, factor: int, halvings: int) -> tuple[Rung, ...]:
    return tuple(
        Rung(
            max(1, max_reports // factor ** (halvings - number)),
            0 if number == halvings else max(1, size // factor ** (number + 1)),
        )
        for number in range(halvings + 1)
    )


@dataclass(slots=True)
class Bracket(Generic[T]):
    """Trials on their way up the rungs. `size`: how many there will be; those that ended otherwise count no more."""

    size: int
    rungs: Sequence[Rung]
    sign: float
    """1 if the smallest value is best, -1 if the largest is."""
    rung: int = 0
    members: set[T] = field(default_factory=set)
    arrived: dict[T, float] = field(default_factory=dict)
    started: int = 0

    @property
    def is_full(self) -> bool:
        return self.started >= self.size

    @property
    def milestone(self) -> int:
        """Reports after which a member waits for the others."""
        return self.rungs[self.rung].reports

    def add(self, trial: T) -> None:
        self.members.add(trial)
        self.started += 1

    def arrive(self, trial: T, value: float) -> None:
        """The trial has come to the milestone."""
        self.arrived[trial] = value

    def leave(self, trial: T) -> None:
        """The trial has ended."""
        self.members.discard(trial)
        self.arrived.pop(trial, None)

    def compare(self) -> tuple[Collection[T], Collection[T]] | None:
        """(those that go on, those that end), once all have arrived; then the next rung is the milestone."""
        if not self.is_full or not self.members or set(self.arrived) != self.members:
            return None
        order = sorted(self.arrived, key=lambda trial: self.sign * self.arrived[trial])
        good, bad = order[: self.rungs[self.rung].go_on], order[self.rungs[self.rung].go_on :]
        self.members, self.arrived = set(good), {}
        self.rung = min(self.rung + 1, len(self.rungs) - 1)
        return good, bad
