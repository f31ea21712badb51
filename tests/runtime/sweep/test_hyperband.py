from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_tracking.runtime.sweep.brackets import Bracket, Rung, plan


def test_the_plan_is_that_of_the_paper():
    """Table 1 of the paper: R = 81, factor 3; of the last bracket's trials each runs for 81."""
    found = plan(81 + 34 + 15 + 8 + 5, 81, 3)
    assert [(size, [rung.reports for rung in rungs]) for size, rungs in found] == [
        (81, [1, 3, 9, 27, 81]),
        (34, [3, 9, 27, 81]),
        (15, [9, 27, 81]),
        (8, [27, 81]),
        (5, [81]),
    ]
    assert [rung.go_on for rung in found[0][1]] == [27, 9, 3, 1, 0]


@given(st.integers(1, 60), st.integers(1, 30), st.integers(2, 5))
def test_every_trial_has_its_place_and_the_milestones_rise_to_the_end(trials, reports, factor):
    found = plan(trials, reports, factor)
    assert sum(size for size, _ in found) == trials
    for _size, rungs in found:
        assert [rung.reports for rung in rungs] == sorted({rung.reports for rung in rungs})
        assert rungs[-1] == Rung(reports, 0)
        assert all(rung.go_on >= 1 for rung in rungs[:-1])


def test_trials_are_compared_when_all_of_them_have_come_and_the_best_go_on():
    bracket = Bracket[str](3, (Rung(1, 1), Rung(3, 0)), 1.0)
    for name, value in (("a", 0.3), ("b", 0.1)):
        bracket.add(name)
        bracket.arrive(name, value)
        assert bracket.compare() is None  # a third will come
    bracket.add("c")
    assert bracket.compare() is None
    bracket.arrive("c", 0.2)
    assert bracket.compare() == (["b"], ["c", "a"])
    assert bracket.milestone == 3
    assert bracket.is_full  # no new trial takes the place of one that was stopped
    bracket.arrive("b", 0.05)
    assert bracket.compare() == ([], ["b"])


@pytest.mark.parametrize("when", ["before the others", "after the others"])
def test_one_that_fails_is_not_waited_for(when):
    bracket = Bracket[str](2, (Rung(1, 1), Rung(3, 0)), -1.0)
    bracket.add("a")
    if when == "before the others":
        bracket.leave("a")
        bracket.add("b")
        assert bracket.is_full
        bracket.arrive("b", 0.1)
    else:
        bracket.add("b")
        bracket.arrive("b", 0.1)
        assert bracket.compare() is None
        bracket.leave("a")
    assert bracket.compare() == (["b"], [])
