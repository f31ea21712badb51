import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_tracking.journal import segments
from ray_tracking.journal.segments import Segment, gaps, layout, parse, plan_history, plan_merge


def segment(first: int, last: int, *, attempt: int | None = 1, size: int = 100, digest: str = "0" * 16) -> Segment:
    return Segment(first, last, digest, attempt, size)


def neighbours(rows: list[int], attempt: int = 1) -> list[Segment]:
    found, first = [], 0
    for count in rows:
        found.append(segment(first, first + count - 1, attempt=attempt))
        first += count
    return found


@pytest.mark.parametrize("attempt", [1, 12, 1234, None])
def test_a_name_tells_all_and_comes_back(attempt):
    one = Segment(7, 10**12 + 5, "0123456789abcdef", attempt, 42)
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
