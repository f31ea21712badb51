import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_tracking.journal import segments
from ray_tracking.journal.segments import NO_TERM, Segment, gaps, layout, parse, plan_history, plan_merge


def segment(
    first: int,
    last: int,
    *,
    attempt: int | None = 1,
    size: int = 100,
    digest: str = "0" * 16,
    term: tuple[int, int] = NO_TERM,
) -> Segment:
    return Segment(first, last, digest, attempt, size, term)


def neighbours(rows: list[int], attempt: int = 1) -> list[Segment]:
    found, first = [], 0
    for count in rows:
        found.append(segment(first, first + count - 1, attempt=attempt))
        first += count
    return found


@pytest.mark.parametrize(
    ("attempt", "term"), [(1, NO_TERM), (12, (1, 0)), (1234, (10**7, 10**5)), (1, (3, 12)), (None, NO_TERM)]
)
def test_a_name_tells_all_and_comes_back(attempt, term):
    one = Segment(7, 10**12 + 5, "0123456789abcdef", attempt, 42, term)
    assert parse(one.name, 42) == one


@pytest.mark.parametrize(
    "name",
    [
        "journal/attempt-001/000000000000-000000000009.arrow",
        "journal/attempt-001/000000000000-000000000009-0123456789abcdeX.arrow",
        "journal/attempt-001/000000000009-000000000000-0123456789abcdef.arrow",
        "journal/attempt-001/000000000000-000000000009-0123456789abcdef.parquet",
        "journal/history.parquet/000000000000-000000000009-0123456789abcdef.arrow",
        "journal/attempt-001/notes.txt",
        "journal/attempt-001/000000000000-000000000009-0123456789abcdef-3.1.arrow",
        "journal/attempt-001/000000000000-000000000009-0123456789abcdef-000000.0000.arrow",
        "journal/history.parquet/000000000000-000000000009-0123456789abcdef-000003.0001.parquet",
        "elsewhere/000000000000-000000000009-0123456789abcdef.arrow",
    ],
)
def test_other_files_are_no_segments(name):
    assert parse(name, 1) is None


def test_the_widest_covers_what_lies_within():
    wide, parts = segment(0, 9), neighbours([3, 3, 4])
    tail, history = segment(10, 12), segment(0, 9, attempt=None)
    found = layout([*parts, tail, wide, history])
    assert found.live == (history, tail)
    assert set(found.covered) == {wide, *parts}
    assert found.next_offset == 13


def test_an_overlap_in_part_is_neither_read_nor_forgotten():
    found = layout([segment(0, 9), segment(5, 14)])
    assert found.live == (segment(0, 9),)
    assert found.clashing == (segment(5, 14),)
    assert found.next_offset == 15


OLD, NEW, NEWEST = (1, 1), (2, 1), (3, 1)


@pytest.mark.parametrize(
    ("late", "others"),
    [
        # as long as the next writer's first one, shorter, longer; it covers several
        (segment(10, 19, term=OLD), [segment(10, 19, attempt=2, term=NEW)]),
        (segment(10, 12, term=OLD), [segment(10, 19, attempt=2, term=NEW)]),
        (segment(10, 99, term=OLD), [segment(10, 19, attempt=2, term=NEW)]),
        (segment(10, 99, term=OLD), [segment(10, 14, attempt=2, term=NEW), segment(15, 19, attempt=2, term=NEW)]),
        # a tracker that was started again within the attempt; one of an attempt without leases
        (segment(10, 99, term=(1, 1)), [segment(10, 19, term=(1, 2))]),
        (segment(10, 99), [segment(10, 19, attempt=2)]),
        # merged; compacted: with what was before it, in a file of its own, the writer after that going on
        (segment(10, 99, term=OLD), [segment(10, 49, attempt=2, term=NEW)]),
        (segment(10, 99, term=OLD), [segment(0, 49, attempt=None)]),
        (segment(10, 99, term=OLD), [segment(10, 49, attempt=None)]),
        (segment(10, 99, term=OLD), [segment(0, 49, attempt=None), segment(50, 59, attempt=3, term=NEWEST)]),
        (segment(10, 99, term=OLD), [segment(0, 9, attempt=None), segment(10, 59, attempt=None)]),
        # one of a writer between the two wrote nothing at all
        (segment(10, 99, term=OLD), [segment(10, 19, attempt=3, term=NEWEST)]),
    ],
)
def test_what_a_writer_that_was_shut_out_wrote_late_is_no_part_of_the_journal(late, others):
    before = segment(0, 9, term=late.term)
    found = layout([late, before, *others])
    without = layout([before, *others])
    assert found.late == (late,)
    assert (found.live, found.covered, found.clashing) == (without.live, without.covered, without.clashing)
    assert found.clashing == ()
    assert found.next_offset == without.next_offset


def test_until_the_next_writer_has_written_nobody_can_know_it_but_that_one():
    late, before = segment(10, 99, term=OLD), segment(0, 9, term=OLD)
    found = layout([late, before])
    assert found.live == (before, late), "present or absent, both are right: it was not acknowledged"
    assert found.up_to(10).live == (before,)
    assert found.up_to(10).next_offset == 10


@st.composite
def writers(draw) -> tuple[list[Segment], list[Segment]]:
    """What writers wrote one after the other, some of it merged; and what those shut out wrote late."""
    right: list[Segment] = []
    late: list[Segment] = []
    term, attempt, offset = (1, 1), 1, 0
    for _ in range(draw(st.integers(1, 6))):
        own = []
        for _ in range(draw(st.integers(1, 5))):
            rows = draw(st.integers(1, 50))
            own.append(segment(offset, offset + rows - 1, attempt=attempt, term=term))
            offset += rows
        if draw(st.booleans()):
            own = (
                [*own[:-1], own[-1]]
                if len(own) == 1
                else [segment(own[0].first, own[-1].last, attempt=attempt, term=term)]
            )
        right += own
        if draw(st.booleans()):
            rows = draw(st.integers(1, 200))
            late.append(segment(offset, offset + rows - 1, attempt=attempt, term=term, digest="f" * 16))
        if draw(st.booleans()):
            term, attempt = (term[0] + 1, draw(st.integers(1, 2))), attempt + 1
        else:
            term = (term[0], term[1] + 1)
    right.append(segment(offset, offset, attempt=attempt, term=term))
    return right, late


@given(writers(), st.randoms(use_true_random=False), st.integers(0, 2**30))
def test_late_segments_change_nothing_in_whatever_order_and_whatever_is_compacted(both, random, upto):
    right, late = both
    compacted = right[: upto % (len(right) + 1)]
    history = [segment(compacted[0].first, compacted[-1].last, attempt=None)] if compacted else []
    leftovers = compacted if upto % 3 == 0 else []  # the compaction was cut off before it deleted them
    rest = right[len(compacted) :]
    files = [*history, *leftovers, *rest, *late]
    random.shuffle(files)
    found = layout(files)
    assert found.live == (*history, *rest)
    assert found.clashing == ()
    assert set(found.covered) | set(found.late) == {*leftovers, *late}
    assert not set(found.covered) & set(rest)


def test_gaps_are_counted_from_the_start_asked_for():
    live = [segment(5, 9), segment(20, 29)]
    assert gaps(live, 0) == [(0, 4), (10, 19)]
    assert gaps(live, 7) == [(10, 19)]
    assert gaps(live, 25) == gaps(live, 40) == []


def test_fewer_than_the_fan_out_are_left_alone():
    assert plan_merge(neighbours([10] * 15)) == ()
    assert len(plan_merge(neighbours([10] * 16))) == 16


def test_neighbours_of_two_attempts_or_around_a_gap_are_not_merged():
    first = neighbours([10] * 10)
    other = [segment(one.first + 100, one.last + 100, attempt=2) for one in first]
    later = [segment(one.first + 200, one.last + 200) for one in first]
    assert plan_merge(first + other) == ()
    assert plan_merge(first + later) == ()


def test_a_barrier_is_not_touched():
    live = neighbours([10] * 40)
    assert live[5] not in plan_merge(live, frozenset({live[5].name}))


@given(st.lists(st.integers(1, 200_000), min_size=1, max_size=300))
def test_merging_ends_with_few_segments_and_loses_no_offset(rows):
    live, rounds = neighbours(rows), 0
    while parts := plan_merge(live):
        at = live.index(parts[0])
        assert tuple(live[at : at + len(parts)]) == parts
        assert len(parts) >= 2
        live[at : at + len(parts)] = [segment(parts[0].first, parts[-1].last)]
        rounds += 1
        assert rounds < 2000
    assert gaps(live, 0) == []
    assert live[-1].last + 1 == sum(rows)
    full = sum(one.weight > segments.TARGET // 2 for one in live)
    assert len(live) <= (full + 1) * 3 * segments.FAN_OUT


def test_each_row_is_rewritten_a_few_times_only():
    live: list[Segment] = []
    rewritten = total = 0
    for _ in range(20_000):
        live.append(segment(total, total + 499))
        total += 500
        while parts := plan_merge(live[-80:]):
            at = live.index(parts[0])
            live[at : at + len(parts)] = [segment(parts[0].first, parts[-1].last)]
            rewritten += sum(part.rows for part in parts)
    assert total == 10**7
    assert rewritten <= 8 * total
    assert len(live) <= 80


def test_the_history_is_made_of_neighbours_and_takes_its_small_files_in_again():
    old = segment(0, 99, attempt=None)
    fresh = [segment(100, 199, attempt=2), segment(200, 299, attempt=3)]
    assert plan_history([old, *fresh]) == [(old, *fresh)]
    assert plan_history([old]) == []
    big = segment(0, 99, attempt=None, size=segments.TARGET)
    assert plan_history([big, *fresh]) == [tuple(fresh)]


@given(st.lists(st.integers(1, 3_000_000), min_size=1, max_size=30))
def test_a_file_of_the_history_stays_within_the_target(rows):
    live = neighbours(rows)
    groups = plan_history(live)
    assert [one for group in groups for one in group] == live
    assert all(len(group) == 1 or sum(one.weight for one in group) <= segments.TARGET for group in groups)
