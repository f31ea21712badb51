"""Which rows a backend is shown when a run has several attempts, so that it shows each point once.

In: rows in journal order. Out: which of them are news. Reads the journal only where an attempt begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from ray_tracking.journal.lineage import COLUMNS, STEPLESS, Point
from ray_tracking.journal.reader import JournalReader
from ray_tracking.records import Kind, Record


class Lineage:
    """What a backend that has been shown the journal up to here knows of the attempts."""

    def __init__(self, begun: Iterable[Record] = ()) -> None:
        self._begun = {row.attempt: (row.step, row.offset) for row in begun}
        self._attempt = 0
        self._shown: frozenset[Point] = frozenset()

    @classmethod
    def at(cls, reader: JournalReader, offset: int) -> Lineage:
        """The lineage of a backend whose cursor stands at `offset`."""
        lineage = cls()
        if offset > 0:
            for table in reader.tables(0, ("offset", "attempt", "kind", "step")):
                began = table.filter(_is_attempt(table))
                for row in began.filter(pc.less(began.column("offset"), offset)).to_pylist():
                    lineage._begun[row["attempt"]] = row["step"], row["offset"]
        return lineage

    def begin(self, reader: JournalReader, row: Record, *, rewinds: bool) -> None:
        """An ATTEMPT row has come; an attempt's second one corrects the first (the checkpoint it named was damaged)."""
        self._begun[row.attempt] = row.step, row.offset
        self._attempt = 0
        self.go_on(reader, row.attempt, rewinds=rewinds)

    def go_on(self, reader: JournalReader, attempt: int, *, rewinds: bool) -> None:
        """Rows of this attempt come next. A backend that can't rewind has been shown points that come again."""
        if attempt == self._attempt:
            return
        begun = self._begun.get(attempt)
        again = begun is not None and attempt > 1 and not rewinds
        self._shown = shown_before(reader, *begun) if again and begun else frozenset()
        self._attempt = attempt

    def news(self, rows: Sequence[Record]) -> Sequence[Record]:
        """Those of one attempt's rows that are to be shown: neither shown by an earlier attempt nor superseded by
        a later one (of a worker group thought dead that still sends).
        """
        attempt, shown = rows[0].attempt, self._shown
        last = min((step for later, (step, _) in self._begun.items() if later > attempt), default=None)
        if last is None and not shown:
            return rows
        return [
            row
            for row in rows
            if row.kind in STEPLESS
            or ((last is None or row.step <= last) and (row.kind, row.key, row.step, row.rank) not in shown)
        ]


def shown_before(reader: JournalReader, step: int, offset: int) -> frozenset[Point]:
    """The points from `step` on that stand in the journal before `offset`; read a segment at a time.

    The resumed step itself is in: what was logged after its checkpoint may be logged again.
    """
    shown: set[Point] = set()
    for table in reader.tables(0, COLUMNS):
        earlier = table.filter(
            pc.and_(
                pc.and_(pc.less(table.column("offset"), offset), pc.greater_equal(table.column("step"), step)),
                pc.invert(_is_attempt(table)),
            )
        )
        columns = (earlier.column(name).to_pylist() for name in ("kind", "key", "step", "rank"))
        shown.update(
            (Kind(kind), key, at, rank) for kind, key, at, rank in zip(*columns, strict=True) if kind not in STEPLESS
        )
    return frozenset(shown)


def split_at_attempts(rows: Sequence[Record]) -> Iterator[Sequence[Record]]:
    """Neighbouring rows of one attempt, each ATTEMPT row alone."""
    begin = 0
    for i in range(1, len(rows)):
        before, row = rows[i - 1], rows[i]
        if row.attempt != before.attempt or Kind.ATTEMPT in (row.kind, before.kind):
            yield rows[begin:i]
            begin = i
    if rows:
        yield rows[begin:]


def _is_attempt(table: pa.Table) -> pa.ChunkedArray:
    return pc.equal(table.column("kind").cast(pa.string()), Kind.ATTEMPT.value)
