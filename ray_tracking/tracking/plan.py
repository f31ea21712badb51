"""Which rows a backend is shown when a run has several attempts, so that it shows each point once.

In: rows in journal order. Out: which of them are news. Reads the journal only where an attempt begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ray_tracking.journal.lineage import COLUMNS, STEPLESS, Point, effective_mask
from ray_tracking.journal.reader import JournalReader
from ray_tracking.records import Kind, Record


class Span(NamedTuple):
    """Rows from offset `begin` to before `end` were shown as they counted when the journal ended at `known`.

    So what a later attempt was known to supersede was left out, and is no point that the backend has been shown.
    """

    begin: int
    end: int
    known: int


def cut(spans: Iterable[Span], offset: int) -> list[Span]:
    """Those parts of the spans that lie before `offset`."""
    return [Span(begin, min(end, offset), known) for begin, end, known in spans if begin < offset]


class Lineage:
    """What a backend that has been shown the journal up to here knows of the attempts."""

    def __init__(self, begun: Iterable[Record] = ()) -> None:
        self._begun = {row.attempt: (row.step, row.offset) for row in begun}
        self._attempt = 0
        self._shown: frozenset[Point] = frozenset()
        self._foreseen: list[_Foreseen] = []

    @classmethod
    def at(cls, reader: JournalReader, offset: int, spans: Iterable[Span] = ()) -> Lineage:
        """The lineage of a backend whose cursor stands at `offset`. A row within a span is shown if it counts there."""
        lineage = cls()
        lineage._foreseen = [_Foreseen(span, _counting(reader, span.known)) for span in spans]
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
        """Rows of this attempt come next. A backend that can't rewind has been shown points that come again.

        So has one that does, at the resumed step itself: what was logged after its checkpoint may be logged again.
        """
        if attempt == self._attempt:
            return
        begun = self._begun.get(attempt)
        if begun is None or attempt == 1:
            self._shown = frozenset()
        elif rewinds:
            self._shown = shown_before(reader, *begun, kept=self._kept(attempt, begun[0]))
        else:
            self._shown = shown_before(reader, *begun, self._foreseen)
        self._attempt = attempt

    def _kept(self, attempt: int, step: int) -> list[int]:
        """The attempts before this one whose points at `step` no attempt between them took back."""
        return [
            earlier
            for earlier in range(1, attempt)
            if all(resumed >= step for later, (resumed, _) in self._begun.items() if earlier < later < attempt)
        ]

    def news(self, rows: Sequence[Record]) -> Sequence[Record]:
        """Those of one attempt's rows that are to be shown: neither shown by an earlier attempt nor superseded by
        a later one (of a worker group thought dead that still sends).
        """
        attempt, shown = rows[0].attempt, self._shown
        for foreseen in self._foreseen:
            if foreseen.span.begin <= rows[0].offset < foreseen.span.end:
                return [
                    row
                    for row in rows
                    if foreseen.counts[row.offset]
                    and (row.kind in STEPLESS or (row.kind, row.key, row.step, row.rank) not in shown)
                ]
        last = min((step for later, (step, _) in self._begun.items() if later > attempt), default=None)
        if last is None and not shown:
            return rows
        return [
            row
            for row in rows
            if row.kind in STEPLESS
            or ((last is None or row.step <= last) and (row.kind, row.key, row.step, row.rank) not in shown)
        ]


class _Foreseen(NamedTuple):
    span: Span
    counts: npt.NDArray[np.bool_]
    """[span.known], by offset."""


def _counting(reader: JournalReader, known: int) -> npt.NDArray[np.bool_]:
    """[known] which of the journal's rows before offset `known` its effective history held then."""
    counts = np.zeros(known, np.bool_)
    tables = [table.filter(pc.less(table.column("offset"), known)) for table in reader.tables(0, COLUMNS)]
    if tables:
        rows = pa.concat_tables(tables).unify_dictionaries()
        counts[rows.column("offset").to_numpy()[effective_mask(rows)]] = True
    return counts


def shown_before(
    reader: JournalReader,
    step: int,
    offset: int,
    foreseen: Sequence[_Foreseen] = (),
    *,
    kept: Sequence[int] | None = None,
) -> frozenset[Point]:
    """The points from `step` on that stand in the journal before `offset` and were shown; read a segment at a time.

    With `kept` those at `step` alone, of these attempts.
    """
    shown: set[Point] = set()
    attempts = pa.array(kept or [], pa.int32())
    for table in reader.tables(0, COLUMNS):
        earlier = table.filter(
            pc.and_(
                pc.and_(pc.less(table.column("offset"), offset), pc.greater_equal(table.column("step"), step)),
                pc.invert(_is_attempt(table)),
            )
        )
        if kept is not None:
            there = pc.and_(pc.equal(earlier.column("step"), step), pc.is_in(earlier.column("attempt"), attempts))
            earlier = earlier.filter(there)
        for (begin, end, _), counts in foreseen:
            offsets = earlier.column("offset").to_numpy()
            inside = (offsets >= begin) & (offsets < end)
            shows = ~inside
            shows[inside] = counts[offsets[inside]]
            earlier = earlier.filter(pa.array(shows))
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
