"""Every rank's own metrics become three of the run: mean, least and greatest over the ranks. Pure but for `unreduced`.

In: RANK_SCALAR rows of one attempt as they are journaled. Out: SCALAR rows `key/mean`, `key/min`, `key/max`,
one set per (key, step), so that what backends are shown does not grow with the number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from ray_tracking.journal.reader import JournalReader
from ray_tracking.journal.schema import records_of_table
from ray_tracking.records import Kind, Record

MEAN, LEAST, GREATEST = "/mean", "/min", "/max"
_Point = tuple[str, int]


class RankReducer:
    """Gathers the rows of each (key, step) until every rank's is there.

    At most `most` points wait; the oldest then goes on with the ranks that came, and their late rows stay in the
    journal alone. Of one rank's repeats the last before the set was whole counts.
    """

    def __init__(self, attempt: int, world_size: int, most: int = 20_000) -> None:
        self.attempt = attempt
        self._world_size = world_size
        self._most = most
        self._waiting: dict[_Point, dict[int, Record]] = {}
        self._done: dict[_Point, None] = {}  # a set that knows its oldest

    def add(self, rows: Iterable[Record]) -> list[Record]:
        """Take in journal rows; returns the rows to be journaled for the points that are whole now.

        Reduced rows among them, from before a restart say, mark their point as done.
        """
        whole: list[Record] = []
        for row in rows:
            if (row.kind is Kind.SCALAR and row.seq) or row.attempt != self.attempt:
                continue  # the first of these is nearly every row
            if row.kind is Kind.SCALAR and row.key.endswith(MEAN):
                self._finish((row.key.removesuffix(MEAN), row.step))
            elif row.kind is Kind.RANK_SCALAR and (row.key, row.step) not in self._done:
                point = (row.key, row.step)
                ranks = self._waiting.setdefault(point, {})
                ranks[row.rank] = row
                if len(ranks) >= self._world_size:
                    whole += reduced(self._finish(point))
                elif len(self._waiting) > self._most:
                    whole += reduced(self._finish(next(iter(self._waiting))))
        return whole

    def drain(self) -> list[Record]:
        """No more rows come: every point that waits, with the ranks that came."""
        return [row for point in list(self._waiting) for row in reduced(self._finish(point))]

    def _finish(self, point: _Point) -> list[Record]:
        self._done[point] = None
        while len(self._done) > self._most:
            del self._done[next(iter(self._done))]
        return list(self._waiting.pop(point, {}).values())


def reduced(rows: list[Record]) -> list[Record]:
    """The three rows of one point's RANK_SCALAR rows, at the time of the last; none of no rows. NaN makes all NaN."""
    if not rows:
        return []
    values = [math.nan if row.value is None else row.value for row in rows]
    odd = any(map(math.isnan, values))
    found = (
        (MEAN, math.nan if odd else _mean(values)),
        (LEAST, math.nan if odd else min(values)),
        (GREATEST, math.nan if odd else max(values)),
    )
    time = max(row.time for row in rows)
    first = rows[0]
    return [
        Record(Kind.SCALAR, f"{first.key}{suffix}", first.step, time, value, attempt=first.attempt)
        for suffix, value in found
    ]


def _mean(values: list[float]) -> float:
    """Whatever the order in which the ranks came, and without an overflow on the way."""
    if any(map(math.isinf, values)):
        return sum(values)  # inf, -inf, or NaN of both
    return math.fsum(value / len(values) for value in values)


def unreduced(reader: JournalReader, attempt: int) -> list[Record]:
    """The RANK_SCALAR rows of an attempt, in journal order, whose point has no reduced rows in the journal yet."""
    rows: list[Record] = []
    done: set[_Point] = set()
    for table in reader.tables():
        mine = table.filter(pc.equal(table.column("attempt"), attempt))
        kinds = mine.column("kind").cast(pa.string())
        rows += records_of_table(mine.filter(pc.equal(kinds, Kind.RANK_SCALAR.value)))
        ours = pc.and_(pc.equal(kinds, Kind.SCALAR.value), pc.equal(mine.column("seq"), 0))
        for row in mine.filter(ours).select(["key", "step"]).to_pylist():
            if row["key"].endswith(MEAN):
                done.add((row["key"].removesuffix(MEAN), row["step"]))
    return [row for row in rows if (row.key, row.step) not in done]
