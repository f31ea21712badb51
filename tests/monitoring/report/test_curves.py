from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ray_tracking.monitoring.report.curves import Curve, points_for, read_curves
from ray_tracking.records import Kind, Record
from ray_tracking.runs.store import RunStore
from tests.monitoring.builder import RunBuilder, scalars


def _curve(values: list[float]) -> Curve:
    count = len(values)
    return Curve(np.arange(count) * 10, np.arange(count) * 1.0, np.arange(1, count + 1), np.array(values))


@given(st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), min_size=1, max_size=300), st.integers(4, 60))
def test_thinning_keeps_the_ends_and_the_extremes(values: list[float], limit: int) -> None:
    thin = _curve(values).thinned(limit)
    assert len(thin.values) <= max(limit, 4)
    assert (thin.steps[0], thin.steps[-1]) == (0, 10 * (len(values) - 1))
    assert np.all(np.diff(thin.steps) > 0)
    finite = [value for value in values if value == value]
    if finite:
        assert np.nanmin(thin.values) == min(finite)
        assert np.nanmax(thin.values) == max(finite)


def test_curves_are_the_effective_history(store: RunStore) -> None:
    run = RunBuilder(store, "r").log(scalars(range(1, 11), scale=1.0))
    run.resume(4).log(scalars(range(5, 9), attempt=2, scale=100.0))
    curve = read_curves(store.directory("r"), 100).by_key["val/loss"]
    assert curve.steps.tolist() == list(range(1, 9))
    assert curve.counts.tolist() == list(range(1, 9))
    assert curve.values.tolist() == [1 / step for step in range(1, 5)] + [100 / step for step in range(5, 9)]


def test_a_run_without_a_journal_has_no_curves(store: RunStore) -> None:
    assert read_curves(store.directory("nothing"), 100).by_key == {}


def test_a_damaged_segment_is_told_and_the_rest_is_shown(store: RunStore) -> None:
    run = RunBuilder(store, "r").log(scalars([1, 2]))
    run.log([Record(Kind.SCALAR, "val/loss", 3, 3.0, 0.5, None, 0, 1, 3)])
    last = max(entry.name for entry in run.directory.list("journal/attempt-001"))
    data = run.directory.read_bytes(f"journal/attempt-001/{last}")
    run.directory.write_bytes(f"journal/attempt-001/{last}", data[: len(data) // 2])
    found = read_curves(store.directory("r"), 100)
    assert found.by_key["val/loss"].steps.tolist() == [1, 2]
    assert found.problem is not None
    assert last in found.problem


def test_many_curves_share_the_points() -> None:
    assert [points_for(count) for count in (1, 100, 100_000)] == [600, 200, 24]
