"""The ranks' own metrics: three points of the run, once, when all have come or no more will."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from ray_tracking.records import Kind, Record
from ray_tracking.tracking.reduce import RankReducer, reduced


def row(rank: int, value: float, step: int = 1, key: str = "time", attempt: int = 1, time: float = 0.0) -> Record:
    return Record(Kind.RANK_SCALAR, key, step, time, value, None, rank, attempt, seq=step)


def shown(rows: list[Record]) -> dict[str, float | None]:
    return {f"{record.key}@{record.step}": record.value for record in rows}


@pytest.mark.parametrize(
    ("values", "mean", "least", "greatest"),
    [
        ([1.0], 1.0, 1.0, 1.0),
        ([1.0, 2.0, 6.0], 3.0, 1.0, 6.0),
        ([1.7e308, 1.7e308], 1.7e308, 1.7e308, 1.7e308),
        ([1.0, math.inf], math.inf, 1.0, math.inf),
        ([1.0, math.nan], math.nan, math.nan, math.nan),
        ([math.inf, -math.inf], math.nan, -math.inf, math.inf),
    ],
)
def test_mean_least_and_greatest(values: list[float], mean: float, least: float, greatest: float) -> None:
    rows = reduced([row(rank, value, time=10.0 + rank) for rank, value in enumerate(values)])
    assert [record.key for record in rows] == ["time/mean", "time/min", "time/max"]
    assert repr([record.value for record in rows]) == repr([mean, least, greatest])
    for record in rows:
        assert (record.kind, record.rank, record.seq, record.time) == (Kind.SCALAR, 0, 0, 9.0 + len(values))


def test_waits_for_every_rank_whatever_the_order() -> None:
    reducer = RankReducer(1, 4)
    rows = [row(rank, float(rank), step) for rank in range(4) for step in range(1, 21)]
    random.Random(3).shuffle(rows)
    found: list[Record] = []
    for one in rows:
        found += reducer.add([one])
    assert Counter((r.key, r.step, r.value) for r in found) == {
        (f"time/{name}", step, value): 1
        for step in range(1, 21)
        for name, value in (("mean", 1.5), ("min", 0.0), ("max", 3.0))
    }
    assert reducer.drain() == []


def test_those_that_came_when_no_more_will_and_late_ones_change_nothing() -> None:
    reducer = RankReducer(1, 2)
    assert reducer.add([row(0, 2.0), row(0, 4.0)]) == []
    assert shown(reducer.drain()) == {"time/mean@1": 4.0, "time/min@1": 4.0, "time/max@1": 4.0}
    assert reducer.add([row(1, 8.0)]) == []
    assert reducer.drain() == []


def test_other_attempts_and_the_run_s_own_metrics_are_left_alone() -> None:
    reducer = RankReducer(2, 1)
    own = Record(Kind.SCALAR, "loss/mean", 1, 0.0, 1.0, attempt=2, seq=5)
    assert reducer.add([row(0, 1.0, attempt=1), own]) == []
    assert len(reducer.add([row(0, 1.0, attempt=2, key="loss")])) == 3


def test_what_waits_is_bounded() -> None:
    """Only rank 0 logs it: the ranks that came are enough after a while."""
    reducer = RankReducer(1, 2, most=10)
    found = reducer.add(row(0, 1.0, step) for step in range(1, 31))
    assert sorted({record.step for record in found}) == list(range(1, 21))
    assert len(reducer.drain()) == 30
    assert len(reducer._done) <= 10
