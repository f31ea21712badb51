"""Which rows are news to a backend over several attempts; compared with the journal's own effective history."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_tracking.journal.reader import JournalReader
from ray_tracking.records import Kind, Record
from ray_tracking.tracking.plan import Lineage, Span, cut, split_at_attempts
from tests.tracking.fakes import Journal


def row(attempt: int, kind: Kind = Kind.SCALAR) -> Record:
    return Record(kind, "k", 1, 0.0, attempt=attempt)


def test_split_at_attempts() -> None:
    begin = Kind.ATTEMPT
    rows = [row(1, begin), row(1), row(1), row(2, begin), row(2), row(3, begin), row(1), row(3)]
    assert [[(r.attempt, r.kind is begin) for r in part] for part in split_at_attempts(rows)] == [
        [(1, True)],
        [(1, False), (1, False)],
        [(2, True)],
        [(2, False)],
        [(3, True)],
        [(1, False)],
        [(3, False)],
    ]
    assert list(split_at_attempts([])) == []


ATTEMPTS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 3), st.integers(1, 6)), min_size=1, max_size=5)
"""(steps gone back, a first resumed step that was too late by so many, steps logged) of each attempt."""


def journal_of(folder: Path, attempts: list[tuple[int, int, int]]) -> JournalReader:
    """Each attempt resumes at or before where the run had come, and logs some steps on from there.

    Some say at first that they resume at a later step: the checkpoint of that one was damaged. The resumed step itself
    is logged again.
    """
    journal = Journal(folder)
    reached = 0
    for number, (back, damaged, steps) in enumerate(attempts, 1):
        resumed = max(0, reached - back) if number > 1 else -1
        if number > 1 and damaged:
            journal.begin(number, min(resumed + damaged, reached))
        journal.begin(number, resumed)
        begin = max(resumed, 0)
        journal.points(range(begin + (number == 1), begin + 1 + steps), attempt=number, keys=1, value=100.0 * number)
        reached = begin + steps
    return JournalReader(journal.storage)


Point = tuple[str, int, float | None]


def show(reader: JournalReader, lineage: Lineage, begin: int, end: int, shown: list[Point], *, rewinds: bool) -> None:
    """What a backend is shown of the rows from `begin` to before `end`."""
    for part in split_at_attempts(reader.read(begin, end - begin) if end > begin else []):
        if part[0].kind is Kind.ATTEMPT:
            if rewinds and part[0].attempt > 1:
                shown[:] = [point for point in shown if point[1] <= part[0].step]
            lineage.begin(reader, part[0], rewinds=rewinds)
        else:
            lineage.go_on(reader, part[0].attempt, rewinds=rewinds)
            shown += [(record.key, record.step, record.value) for record in lineage.news(part)]


def effective(reader: JournalReader) -> set[Point]:
    table = reader.effective()
    return set(zip(*(table[name].to_pylist() for name in ("key", "step", "value")), strict=True))


def without_values(points: Iterable[Point]) -> list[tuple[str, int]]:
    return [(key, step) for key, step, _ in points]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ATTEMPTS, st.booleans(), st.data())
def test_shows_the_effective_history_each_point_once(
    tmp_path_factory: pytest.TempPathFactory,
    attempts: list[tuple[int, int, int]],
    rewinds: bool,
    data: st.DataObject,
) -> None:
    reader = journal_of(tmp_path_factory.mktemp("run"), attempts)
    restart = data.draw(st.integers(0, reader.next_offset))
    shown: list[Point] = []
    for begin, end in ((0, restart), (restart, reader.next_offset)):
        show(reader, Lineage.at(reader, begin), begin, end, shown, rewinds=rewinds)
    names = without_values(shown)
    wanted = set(without_values(effective(reader)))
    assert len(names) == len(set(names))
    # One that can't rewind keeps what was shown past the last resumed step and has not come again yet.
    assert wanted <= set(names)
    assert not rewinds or wanted == set(names)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ATTEMPTS, st.data())
def test_filled_after_the_end_it_is_shown_what_counts(
    tmp_path_factory: pytest.TempPathFactory, attempts: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    """Of a backend that can't rewind: up to `begin` it followed the run, then it was down, and `sync` fills it up to
    `end`, cut off once; then the run is resumed and it follows again.
    """
    reader = journal_of(tmp_path_factory.mktemp("run"), attempts)
    begin = data.draw(st.integers(0, reader.next_offset))
    end = data.draw(st.integers(begin, reader.next_offset))
    middle = data.draw(st.integers(begin, end))
    shown: list[Point] = []
    show(reader, Lineage.at(reader, 0), 0, begin, shown, rewinds=False)
    spans = [Span(begin, end, end)]
    show(reader, Lineage.at(reader, begin, spans), begin, middle, shown, rewinds=False)
    spans = [*cut(spans, middle), Span(middle, end, end)]
    show(reader, Lineage.at(reader, middle, spans), middle, end, shown, rewinds=False)
    show(reader, Lineage.at(reader, end, cut(spans, end)), end, reader.next_offset, shown, rewinds=False)
    names = without_values(shown)
    assert len(names) == len(set(names))
    assert set(without_values(effective(reader))) <= set(names)
    if (begin, end) == (0, reader.next_offset):
        assert set(shown) == effective(reader)


def test_cut() -> None:
    assert cut([Span(0, 10, 10), Span(10, 30, 40)], 20) == [Span(0, 10, 10), Span(10, 20, 40)]
    assert cut([Span(5, 10, 10)], 5) == []
