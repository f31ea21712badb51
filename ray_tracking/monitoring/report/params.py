"""The params of a sweep as axes: which there are, how each is spread, where a value lies on it. Pure.

In: the space as configured, the params of the trials. Out: an `Axis` per param.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ray_tracking.config.sweep_space import SHAPES, Constant, Distribution, Group, Node, Options, parse
from ray_tracking.errors import RayTrackingError
from ray_tracking.monitoring.compare import flatten
from ray_tracking.monitoring.wording import value as shown

Scale = Literal["linear", "log", "category"]

_MAX_TICKS = 6


@dataclass(frozen=True, slots=True)
class Axis:
    """`name` is the dotted key. `low` and `high` hold all values of a number, `categories` those of anything else."""

    name: str
    scale: Scale
    low: float = 0.0
    high: float = 1.0
    categories: tuple[str, ...] = ()

    def place(self, value: Any) -> float:
        """Where the value lies, from 0 to 1."""
        if self.scale == "category":
            count = len(self.categories)
            return self.categories.index(shown(value)) / (count - 1) if count > 1 else 0.5
        low, high, at = (self._scaled(number) for number in (self.low, self.high, value))
        return (at - low) / (high - low) if high > low else 0.5

    def ticks(self) -> list[tuple[float, str]]:
        """(place, label) of a few values to read it by."""
        if self.scale == "category":
            return [(self.place(category), category) for category in self.categories]
        if self.low == self.high:
            return [(0.5, shown(self.low))]
        values = _decades(self.low, self.high) if self.scale == "log" else _steps(self.low, self.high)
        return [(self.place(value), f"{value:g}") for value in values]

    def _scaled(self, number: float) -> float:
        return math.log10(number) if self.scale == "log" else float(number)


def axes(space: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> list[Axis]:
    """Of every param that a trial has, in the order of the space. `trials`: the params of each, flat.

    A space that can't be read (a newer version's) costs the logarithmic axes, no more.
    """
    leaves = dict(_leaves(_tree(space)))
    names = [*leaves, *(name for params in trials for name in params if name not in leaves)]
    found = []
    for name in dict.fromkeys(names):
        values = [params[name] for params in trials if name in params]
        if values:
            found.append(_axis(name, leaves.get(name), values))
    return found


def number_axis(name: str, values: Iterable[float]) -> Axis:
    """Of a metric: logarithmic if it spans more than two decades."""
    found = list(values)
    low, high = min(found, default=0.0), max(found, default=1.0)
    return Axis(name, "log" if low > 0 and high / low > 100 else "linear", low, high)


def flat(params: Mapping[str, Any]) -> dict[str, Any]:
    """`{"optimizer": {"kind": "adam"}}` as `{"optimizer.kind": "adam"}`."""
    return flatten(params)


def _tree(space: Mapping[str, Any]) -> Group:
    try:
        tree, problems = parse(space)
    except (RayTrackingError, TypeError, ValueError, AttributeError):
        return Group({})
    return Group({}) if problems else tree


def _leaves(node: Node, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Node]]:
    """The params of a space by dotted key; those of an option that is a space stand where the choice does."""
    if isinstance(node, Group):
        for key, item in node.items.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(node, Options) and any(_is_mapping(option) for option in node.options):
        for option in node.options:
            yield from _leaves(option, path)
    elif isinstance(node, Constant) and isinstance(node.value, Mapping):
        for name in flatten(node.value):
            yield ".".join((*path, name)), Constant(None)
    else:
        yield ".".join(path), node


def _is_mapping(option: Node) -> bool:
    return isinstance(option, Group) or (isinstance(option, Constant) and isinstance(option.value, Mapping))


def _axis(name: str, node: Node | None, values: Sequence[Any]) -> Axis:
    numbers = [float(value) for value in values if _is_number(value)]
    if isinstance(node, Options | Constant) or len(numbers) < len(values):
        return Axis(name, "category", categories=_categories(node, values))
    low, high = min(numbers), max(numbers)
    log = False
    if isinstance(node, Distribution):
        log = SHAPES[node.kind].log
        if "sd" not in SHAPES[node.kind].arguments:
            low, high = min(low, node.numbers[0]), max(high, node.numbers[1])
    return Axis(name, "log" if log and low > 0 else "linear", low, high)


def _categories(node: Node | None, values: Sequence[Any]) -> tuple[str, ...]:
    """As the space lists them, or numbers by size and the rest as they came."""
    options = node.options if isinstance(node, Options) else ()
    listed = [option.value for option in options if isinstance(option, Constant)]
    every = [*listed, *values]
    if all(_is_number(value) for value in every):
        every.sort()
    return tuple(dict.fromkeys(shown(value) for value in every))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within the range, the fewest of them that are at least three."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    found: list[float] = []
    for factors in ((1,), (1, 3), (1, 2, 5)):
        powers = range(first, last + 1)
        found = [factor * 10.0**power for power in powers for factor in factors if _in(low, factor * 10.0**power, high)]
        if len(found) >= 3:
            break
    step = math.ceil(len(found) / _MAX_TICKS)
    return found[::step] if len(found) >= 2 else [low, high]


def _steps(low: float, high: float) -> list[float]:
    """Round numbers within the range."""
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _in(low: float, value: float, high: float) -> bool:
    return low * (1 - 1e-9) <= value <= high * (1 + 1e-9)
