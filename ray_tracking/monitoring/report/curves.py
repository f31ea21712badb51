"""Learning curves: a run's scalars from its journal, thinned out so that a page can hold many.

In: a run's directory. Out: `Curve` by key. Peaks survive: of each stretch its least and greatest value stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow.compute as pc

from ray_tracking.errors import RayTrackingError
from ray_tracking.journal.reader import JournalReader
from ray_tracking.storage import Storage

_MIN_POINTS, _MAX_POINTS = 24, 600


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric of one run. All arrays [N]: training step, Unix seconds, which value of the metric it is (from 1)."""

    steps: np.ndarray
    times: np.ndarray
    counts: np.ndarray
    values: np.ndarray

    def thinned(self, limit: int) -> Curve:
        """At most `limit` points (4 at least), the first and last among them."""
        kept = _kept(self.values, max(limit, 4))
        return Curve(self.steps[kept], self.times[kept], self.counts[kept], self.values[kept])


@dataclass(frozen=True, slots=True)
class Curves:
    """`problem`: what of the journal could not be read, None if all could."""

    by_key: Mapping[str, Curve]
    problem: str | None = None


def points_for(curves: int, budget: int = 20_000) -> int:
    """How many points each of so many curves in one chart may have."""
    return min(_MAX_POINTS, max(_MIN_POINTS, budget // max(curves, 1)))


def read_curves(directory: Storage, limit: int) -> Curves:
    """The effective history of every scalar, each curve thinned to `limit` points."""
    reader = JournalReader(directory, strict=False)
    try:
        table = reader.effective()
    except RayTrackingError as error:
        return Curves({}, error.message)
    found = {}
    for key in sorted(pc.unique(table["key"]).to_pylist()):
        rows = table.filter(pc.equal(table["key"], key))
        steps, times, values = (rows[name].to_numpy() for name in ("step", "time", "value"))
        order = np.argsort(steps, kind="stable")
        curve = Curve(steps[order], times[order], np.arange(1, len(steps) + 1), values[order])
        found[key] = curve.thinned(limit)
    skipped = f"{', '.join(reader.skipped)} of its journal could not be read" if reader.skipped else None
    return Curves(found, skipped)


def _kept(values: np.ndarray, limit: int) -> np.ndarray:
    """Which of the points stay: indices, ascending."""
    count = len(values)
    if count <= limit:
        return np.arange(count)
    edges = np.linspace(1, count - 1, (limit - 2) // 2 + 1).astype(int)
    kept = [0, count - 1]
    for start, stop in pairwise(edges):
        stretch = values[start:stop]
        if np.isnan(stretch).all():
            kept.append(int(start))
            continue
        kept += [int(start + np.nanargmin(stretch)), int(start + np.nanargmax(stretch))]
    return np.unique(kept)
