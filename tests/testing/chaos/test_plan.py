from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_tracking.errors import RunFailedError
from ray_tracking.testing.chaos.plan import STEPS_PER_STRIKE, Part, draw

parts = st.lists(st.sampled_from(list(Part)), min_size=1, unique=True)


@given(parts, st.integers(1, 30), st.integers(0, 1000), st.integers(0, 2**32))
def test_strikes_rise_within_the_run_and_spread_over_the_parts(
    chosen: list[Part], times: int, more: int, seed: int
) -> None:
    steps = times * STEPS_PER_STRIKE + more
    strikes = draw(chosen, times, steps, seed)
    assert [strike.number for strike in strikes] == list(range(1, times + 1))
    due = [strike.step for strike in strikes]
    assert due == sorted(due)
    assert due[0] >= 1
    assert due[-1] <= round(0.85 * steps)
    counts = Counter(strike.part for strike in strikes)
    assert set(counts) <= set(chosen)
    assert max(counts.values()) - min(counts[part] for part in chosen) <= 1
    assert all(0 <= strike.pick < 1 for strike in strikes)


def test_a_seed_says_it_all() -> None:
    assert draw(list(Part), 10, 400, 7) == draw(list(Part), 10, 400, 7)
    assert draw(list(Part), 10, 400, 7) != draw(list(Part), 10, 400, 8)


def test_a_run_that_is_too_short_is_told_so() -> None:
    with pytest.raises(RunFailedError, match=r"up to step 39: too short for 10 faults[^|]*40 steps"):
        draw(list(Part), 10, 39, 0)
    with pytest.raises(RunFailedError, match="up to step 0"):
        draw([Part.WORKER], 1, 0, 0)
