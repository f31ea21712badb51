"""What a benchmark returns: two sides, their samples, one result and its goal. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Setup:
    """What a figure is told: `quick` asks for the short form; `folder` is empty and its own."""

    folder: Path
    quick: bool = False


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound on the result, in the result's unit; the bound itself is good enough."""

    bound: float
    at_most: bool

    def is_met_by(self, result: float) -> bool:
        """False for NaN, whichever way the bound goes."""
        return result <= self.bound if self.at_most else result >= self.bound


def at_most(bound: float) -> Goal:
    return Goal(bound, at_most=True)


def at_least(bound: float) -> Goal:
    return Goal(bound, at_most=False)


@dataclass(frozen=True, slots=True)
class Side:
    """One side: a sample per block, in the measurement's unit, in the order they were taken."""

    name: str
    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        return interquartile_range(self.samples)


@dataclass(frozen=True, slots=True)
class Measurement:
    """`results` has one number per block, `result` is their median; `result_unit` is "x", a unit, or "" for a count."""

    figure: str
    what: str
    unit: str
    ours: Side
    base: Side | None
    results: tuple[float, ...]
    result_unit: str
    goal: Goal
    note: str = ""
    """What a reader of the result should know besides; printed below the table."""

    @property
    def result(self) -> float:
        return statistics.median(self.results)

    @property
    def is_met(self) -> bool:
        return self.goal.is_met_by(self.result)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, the raw samples too."""
        sides = {
            name: {**asdict(side), "median": side.median, "iqr": side.spread}
            for name, side in (("ours", self.ours), ("base", self.base))
            if side is not None
        }
        return {
            "figure": self.figure,
            "what": self.what,
            "unit": self.unit,
            **sides,
            "result": self.result,
            "result_iqr": interquartile_range(self.results),
            "result_unit": self.result_unit,
            "goal": asdict(self.goal),
            "met": self.is_met,
            "note": self.note,
        }


def ratio(figure: str, what: str, unit: str, ours: Side, base: Side, goal: Goal) -> Measurement:
    """Ours divided by the base, pair by pair: what disturbs the machine for a while disturbs both of a pair."""
    return _paired(figure, what, unit, ours, base, goal, "x", lambda mine, other: mine / other)


def speedup(figure: str, what: str, unit: str, ours: Side, base: Side, goal: Goal) -> Measurement:
    """The base divided by ours, pair by pair: how many times faster we are, from times."""
    return _paired(figure, what, unit, ours, base, goal, "x", lambda mine, other: other / mine)


def difference(figure: str, what: str, unit: str, ours: Side, base: Side, goal: Goal) -> Measurement:
    """Ours less the base, pair by pair."""
    return _paired(figure, what, unit, ours, base, goal, unit, lambda mine, other: mine - other)


def absolute(figure: str, what: str, unit: str, ours: Side, goal: Goal) -> Measurement:
    """One side alone, held against its goal as it is."""
    return Measurement(figure, what, unit, ours, None, ours.samples, unit, goal)


def _paired(
    figure: str,
    what: str,
    unit: str,
    ours: Side,
    base: Side,
    goal: Goal,
    result_unit: str,
    combine: Callable[[float, float], float],
) -> Measurement:
    if len(ours.samples) != len(base.samples):
        raise ValueError(f"{what}: {len(ours.samples)} samples of {ours.name}, {len(base.samples)} of {base.name}")
    results = tuple(combine(mine, other) for mine, other in zip(ours.samples, base.samples, strict=True))
    return Measurement(figure, what, unit, ours, base, results, result_unit, goal)


def interquartile_range(samples: Sequence[float]) -> float:
    """The distance between the first and third quartile; 0 for a single sample."""
    if len(samples) < 2:
        return 0.0
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return third - first


def percentile(samples: Sequence[float], percent: float) -> float:
    """The smallest sample that at least `percent` % of the samples do not exceed (nearest rank)."""
    if not samples:
        raise ValueError("a percentile of no samples")
    rank = max(-(-len(samples) * percent // 100), 1)
    return sorted(samples)[int(rank) - 1]
