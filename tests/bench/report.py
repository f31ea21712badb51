"""Measurements as a table for people and as JSON for machines. Pure but for the writing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench.measures import Goal, Measurement, Side

_HEADER = ("figure", "what", "ours", "base", "result", "goal", "verdict")
_NUMBERS = (2, 3, 4, 5)
_PREFIXES = ((1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"))


def table(measurements: Iterable[Measurement]) -> str:
    """One line per measurement: each side as median ± interquartile range."""
    measurements = list(measurements)
    rows = [_HEADER, *(_row(measurement) for measurement in measurements)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    lines = ["  ".join(_aligned(cell, i, widths[i]) for i, cell in enumerate(row)).rstrip() for row in rows]
    notes = [f"{measurement.figure}: {measurement.note}" for measurement in measurements if measurement.note]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:], *notes])


def _aligned(cell: str, column: int, width: int) -> str:
    return cell.rjust(width) if column in _NUMBERS else cell.ljust(width)


def _row(measurement: Measurement) -> tuple[str, ...]:
    return (
        measurement.figure,
        measurement.what,
        side_text(measurement.ours, measurement.unit),
        side_text(measurement.base, measurement.unit) if measurement.base else "",
        quantity(measurement.result, measurement.result_unit),
        goal_text(measurement.goal, measurement.result_unit),
        "met" if measurement.is_met else "MISSED",
    )


def side_text(side: Side, unit: str) -> str:
    return f"{quantity(side.median, unit)} ± {quantity(side.spread, unit)}"


def goal_text(goal: Goal, unit: str) -> str:
    return f"{'≤' if goal.at_most else '≥'} {quantity(goal.bound, unit)}"


def quantity(number: float, unit: str) -> str:
    """A number with its unit, times in the prefix that suits them: `0.43 µs`, `70.2 steps/s`, `2.10x`, `0`."""
    if not math.isfinite(number):
        return f"{number}{unit}"
    if unit == "s":
        for factor, prefix in _PREFIXES:
            if abs(number) >= factor:
                return f"{_digits(number / factor)} {prefix}s"
        return f"{_digits(number / 1e-9)} ns" if number else "0 s"
    if unit == "x":
        return f"{number:.3f}x" if 0.9 <= number < 1 else f"{_digits(number)}x"
    return f"{_digits(number)} {unit}".rstrip()


def _digits(number: float) -> str:
    """Three digits, and none after the point for whole numbers and thousands."""
    if number == int(number) or abs(number) >= 1000:
        return f"{number:.0f}"
    if abs(number) < 0.01:
        return f"{number:.2g}"
    return f"{number:.{max(2 - math.floor(math.log10(abs(number))), 0)}f}"


def document(
    name: str,
    title: str,
    measurements: Sequence[Measurement],
    machine: Mapping[str, Any],
    *,
    quick: bool,
    seconds: float,
) -> dict[str, Any]:
    """The JSON of one figure."""
    return {
        "figure": name,
        "title": title,
        "met": bool(measurements) and all(measurement.is_met for measurement in measurements),
        "quick": quick,
        "seconds": round(seconds, 1),
        "machine": dict(machine),
        "measurements": [measurement.to_dict() for measurement in measurements],
    }


def write(folder: Path, content: Mapping[str, Any]) -> Path:
    """`<folder>/<figure>.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{content['figure']}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path
