"""Who may take over, when, and whom that shuts out: decided without any I/O."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_tracking.runs.lease_rules import (
    RENEWAL,
    SILENCE,
    TRUST,
    LeaseRecord,
    Seat,
    Seen,
    Verdict,
    expires_in,
    judge,
    parse_record,
    silence_left,
)
from ray_tracking.runs.process import Process

HELD = LeaseRecord(Process("a", 1, "b", "n", "s"), "token", 1e9, 30.0, 5)
RELEASED = replace(HELD, released=True)
NAN = float("nan")


def test_a_holder_stops_believing_before_anyone_else_begins():
    assert 0 < RENEWAL < TRUST < SILENCE < 1


@pytest.mark.parametrize(
    ("owner", "verdict"),
    [
        (None, Verdict.FREE),
        (Seen(RELEASED, 1.0), Verdict.FREE),
        (Seen(HELD, 1.0, dead=True), Verdict.FREE),
        (Seen(HELD, 0.0), Verdict.HELD),
        (Seen(HELD, 30.0), Verdict.HELD),
        (Seen(HELD, -1.0), Verdict.HELD),  # modification times in whole seconds
        (Seen(HELD, 30.1), Verdict.DOUBTFUL),
        (Seen(HELD, 30.1, watched=14.9), Verdict.DOUBTFUL),
        (Seen(HELD, 30.1, watched=15.0), Verdict.FREE),
        (Seen(HELD, 3600.0), Verdict.DOUBTFUL),  # or the storage's clock has jumped forward
        (Seen(HELD, 3600.0, watched=3.0, moved=True), Verdict.HELD),  # it had: the owner renews
        (Seen(HELD, -3600.0), Verdict.DOUBTFUL),  # it was set back
        (Seen(HELD, -3600.0, watched=15.0), Verdict.FREE),
        (Seen(HELD, -3600.0, watched=29.0, moved=True), Verdict.HELD),
        (Seen(HELD, 3.0, watched=30.1, moved=True), Verdict.FREE),  # it stands still: only our own clock goes
        (Seen(HELD, 3.0, watched=30.1), Verdict.FREE),
        (Seen(replace(HELD, duration=300.0), 100.0), Verdict.HELD),
        (Seen(None, 5.0), Verdict.HELD),  # unreadable: as long as by default
        (Seen(None, 31.0), Verdict.DOUBTFUL),
        (Seen(None, 31.0, watched=15.0), Verdict.FREE),
    ],
)
def test_who_may_take_over(owner, verdict):
    assert judge(owner) is verdict


seen = st.builds(
    Seen,
    st.sampled_from([None, HELD, RELEASED, replace(HELD, duration=3.0)]),
    st.floats(-1e5, 1e5),
    st.floats(0, 1e3),
    st.booleans(),
    st.booleans(),
)


@given(seen)
def test_a_lease_that_may_be_taken_is_over_or_was_silent_long_enough(owner):
    if judge(owner) is Verdict.FREE:
        assert owner.is_over or owner.watched >= SILENCE * owner.duration
    else:
        assert not owner.is_over
    assert 0 <= expires_in(owner) <= owner.duration


@given(st.lists(seen))
def test_the_newcomer_waits_for_all_before_it(before):
    left = silence_left(before)
    assert left >= 0
    for each in before:
        assert each.is_over or each.watched + left >= SILENCE * each.duration * 0.999
    assert left == 0 or any(not each.is_over for each in before)


@pytest.mark.parametrize(
    ("one", "other", "shuts_out", "follows"),
    [
        (Seat(2), Seat(1), True, True),
        (Seat(2), Seat(1, 3), True, True),
        (Seat(2, 1), Seat(1), True, True),
        (Seat(1, 2), Seat(1, 1), True, True),
        (Seat(1, 1), Seat(1), False, False),  # a writer works for its owner
        (Seat(1), Seat(1, 1), False, False),
        (Seat(1), Seat(1), False, False),
        (Seat(1, 1), Seat(1, 1), False, False),
        (Seat(1), Seat(2), False, False),
        (Seat(1, 9), Seat(2), False, False),
    ],
)
def test_the_order_of_seats(one, other, shuts_out, follows):
    assert one.shuts_out(other) is shuts_out
    assert one.follows(other) is follows


@given(st.integers(1, 10**8), st.integers(0, 10**6))
def test_a_seat_is_told_by_its_name(epoch, number):
    seat = Seat(epoch, number)
    assert Seat.parse(seat.name.removeprefix("lease/")) == seat


@pytest.mark.parametrize("name", ["", "probe-0123", "000001", "000001-", "000001-0000x", "x000001-0000", "1-0"])
def test_other_names_are_no_seats(name):
    assert Seat.parse(name) is None


def test_a_record_is_read_as_written_and_by_older_versions():
    assert parse_record(HELD.to_json()) == HELD
    values = json.loads(RELEASED.to_json())
    assert parse_record(json.dumps({**values, "later": 1, "process": {**values["process"], "later": 2}}).encode()) == (
        RELEASED
    )


@pytest.mark.parametrize(
    "change",
    [
        {"process": None},
        {"process": {"host": "a", "pid": "1"}},
        {"process": {"host": "a", "pid": 0}},
        {"process": {"host": "a", "pid": 2**40}},
        {"process": {"host": 1, "pid": 1}},
        {"process": {"host": "a", "pid": 1, "boot": None}},
        {"token": 5},
        {"acquired": NAN},
        {"acquired": None},
        {"acquired": 1e300},
        {"duration": 0},
        {"duration": -1},
        {"duration": 1e9},
        {"duration": NAN},
        {"duration": "30"},
        {"released": "no"},
    ],
)
def test_a_record_that_makes_no_sense_is_not_readable(change):
    assert parse_record(json.dumps({**json.loads(HELD.to_json()), **change}).encode()) is None


@given(st.binary() | st.text().map(str.encode) | st.recursive(st.none() | st.floats() | st.text(), st.lists).map(
    lambda value: json.dumps(value).encode()
))  # fmt: skip
def test_what_is_no_record_is_not_readable(data):
    assert parse_record(data) is None


@given(st.integers(0, len(HELD.to_json()) - 1))
def test_a_record_that_is_cut_off_is_not_readable(size):
    assert parse_record(HELD.to_json()[:size]) is None
