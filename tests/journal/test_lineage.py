"""The effective history, against the rule written out row by row."""

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_tracking.journal import lineage, schema
from ray_tracking.records import Kind, Record
from tests.journal.helpers import began, scalar

KINDS = [Kind.SCALAR, Kind.SCALAR, Kind.SCALAR, Kind.TEXT, Kind.PARAM, Kind.TAG]


def reference(rows: list[Record]) -> list[Record]:
    """The contract, as it is worded."""
    resumed = {row.attempt: row.step for row in rows if row.kind is Kind.ATTEMPT}
    kept = []
    for place, row in enumerate(rows):
        if row.kind is Kind.ATTEMPT:
            continue
        if row.kind in (Kind.PARAM, Kind.TAG, Kind.ARTIFACT):
            if not any((other.kind, other.key) == (row.kind, row.key) for other in rows[place + 1 :]):
                kept.append(row)
            continue
        kept.append(row)
    survivors = [
        row
        for row in kept
        if row.kind in (Kind.PARAM, Kind.TAG, Kind.ARTIFACT)
        or all(row.step <= step for later, step in resumed.items() if later > row.attempt)
    ]

    def beaten(row: Record) -> bool:
        return row.kind in (Kind.SCALAR, Kind.TEXT) and any(
            other.attempt > row.attempt
            and (other.kind, other.key, other.step, other.rank) == (row.kind, row.key, row.step, row.rank)
            for other in survivors
        )

    return [row for row in survivors if not beaten(row)]


@st.composite
def journals(draw) -> list[Record]:
    """Runs killed and resumed at a step not past what was logged, with rows that come late."""
    rows: list[Record] = []
    reached = 0
    for attempt in range(1, draw(st.integers(1, 4)) + 1):
        resumed = draw(st.integers(-1, reached)) if attempt > 1 else -1
        if attempt == 1 or draw(st.integers(0, 9)):  # now and then the record that says so is missing
            rows.append(began(attempt, resumed))
        step = max(resumed, 0)
        for _ in range(draw(st.integers(0, 12))):
            step += draw(st.integers(0, 2))
            late = max(1, attempt - draw(st.sampled_from([0, 0, 0, 0, 1])))
            kind = draw(st.sampled_from(KINDS))
            key, rank = draw(st.sampled_from("ab")), draw(st.sampled_from([0, 0, 1]))
            rows.append(Record(kind, key, step, 1.0, None, None, rank, late))
        reached = max(reached, step)
    return schema.number(rows, 0)


def table(rows: list[Record]) -> pa.Table:
    return schema.table_of(rows)


@settings(max_examples=400, deadline=None)
@given(journals())
def test_the_vectorised_mask_is_the_rule(rows):
    mask = lineage.effective_mask(table(rows))
    assert [row for row, keep in zip(rows, mask, strict=True) if keep] == reference(rows)
    assert lineage.effective_records(rows) == reference(rows)


@settings(max_examples=100, deadline=None)
@given(journals(), st.integers(1, 40))
def test_it_does_not_matter_how_the_rows_are_cut_into_segments(rows, size):
    parts = [table(rows[at : at + size]) for at in range(0, len(rows), size)] or [table([])]
    whole = pa.concat_tables(parts)
    assert lineage.effective_mask(whole).tolist() == lineage.effective_mask(table(rows)).tolist()


def test_a_resume_supersedes_what_lies_past_it():
    rows = schema.number(
        [
            began(1, -1),
            *(scalar(step) for step in range(1, 8)),
            began(2, 4),
            *(scalar(s, attempt=2) for s in (5, 6)),
        ],
        0,
    )
    kept = [row for row, keep in zip(rows, lineage.effective_mask(table(rows)), strict=True) if keep]
    assert [(row.step, row.attempt) for row in kept] == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2)]


def test_a_fresh_start_supersedes_everything_but_params():
    rows = [
        began(1, -1),
        scalar(1),
        Record(Kind.PARAM, "lr", 0, 1.0, None, b"1"),
        began(2, -1),
        scalar(2, attempt=2),
    ]
    kept = lineage.effective_mask(table(schema.number(rows, 0))).tolist()
    assert kept == [False, False, True, False, True]


def test_repeats_within_one_attempt_stay_and_the_later_attempt_wins_at_the_resumed_step():
    rows = [began(1, -1), scalar(3), scalar(3), began(2, 3), scalar(3, attempt=2), scalar(3, attempt=2)]
    kept = lineage.effective_mask(table(schema.number(rows, 0))).tolist()
    assert kept == [False, False, False, False, True, True]


def test_resumes_from_rows_and_from_a_table():
    rows = schema.number([began(1, -1), scalar(1), began(2, 1), began(5, 0)], 0)
    assert lineage.resumes(rows) == lineage.resumes(table(rows)) == {1: -1, 2: 1, 5: 0}
