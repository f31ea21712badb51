"""Which rows are news to a backend over several attempts; compared with the journal's own effective history."""

from __future__ import annotations

from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_tracking.journal.reader import JournalReader
from ray_tracking.records import Kind, Record
from ray_tracking.tracking.plan import Lineage, split_at_attempts
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


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 3), st.integers(1, 6)), min_size=1, max_size=5),
    st.booleans(),
    st.data(),
)
def test_shows_the_effective_history_each_point_once(
    tmp_path_factory: Path, attempts: list[tuple[int, int, int]], rewinds: bool, data: st.DataObject
) -> None:
    """Each attempt resumes at or before where the run had come, and logs some steps on from there.

    Some say at first that they resume at a later step: the checkpoint of that one was damaged.
    """
    journal = Journal(tmp_path_factory.mktemp("run"))  # type: ignore[attr-defined]
    reached = 0
    for number, (back, damaged, steps) in enumerate(attempts, 1):
        resumed = max(0, reached - back) if number > 1 else -1
        if number > 1 and damaged:
            journal.begin(number, min(resumed + damaged, reached))
        journal.begin(number, resumed)
        begin = max(resumed, 0)
        journal.points(range(begin + 1, begin + 1 + steps), attempt=number, keys=1)
        reached = begin + steps
    reader = JournalReader(journal.storage)
    restart = data.draw(st.integers(0, reader.next_offset))
    shown: list[tuple[str, int]] = []
    for begin, end in ((0, restart), (restart, reader.next_offset)):
        lineage = Lineage.at(reader, begin)
        for part in split_at_attempts(reader.read(begin, end - begin) if end > begin else []):
            if part[0].kind is Kind.ATTEMPT:
                if rewinds and part[0].attempt > 1:
                    shown = [point for point in shown if point[1] <= part[0].step]
                lineage.begin(reader, part[0], rewinds=rewinds)
            else:
                lineage.go_on(reader, part[0].attempt, rewinds=rewinds)
                shown += [(record.key, record.step) for record in lineage.news(part)]
    assert len(shown) == len(set(shown))
    effective = reader.effective()
    wanted = set(zip(effective["key"].to_pylist(), effective["step"].to_pylist(), strict=True))
    # One that can't rewind keeps what was shown past the last resumed step and has not come again yet.
    assert wanted <= set(shown)
    assert not rewinds or wanted == set(shown)
