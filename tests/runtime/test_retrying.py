from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_tracking.runtime.retrying import LONGEST_WAIT_SECONDS, Ending, back_off, decide

FAILURES = st.sampled_from([Ending.FAILED, Ending.LOST])


@pytest.mark.parametrize("ending", [Ending.COMPLETED, Ending.STOPPED, Ending.REFUSED])
def test_what_no_further_try_can_help(ending: Ending) -> None:
    verdict = decide(ending, retries=5, failures=1, progressed=True)
    assert (verdict.again, verdict.failures) == (False, 1)
    assert ending.value in verdict.why


@given(FAILURES, st.integers(0, 6))
def test_a_crash_loop_is_stopped_after_the_budget(ending: Ending, retries: int) -> None:
    tries, failures, again = 0, 0, True
    while again:
        tries += 1
        verdict = decide(ending, retries=retries, failures=failures)
        failures, again = verdict.failures, verdict.again
    assert tries == retries + 1
    assert f"--retries {retries}" in verdict.why


@given(FAILURES, st.integers(1, 6), st.lists(st.booleans(), min_size=1, max_size=60))
def test_progress_refills_the_budget(ending: Ending, retries: int, progress: list[bool]) -> None:
    """Given up exactly when there were more than `retries` failures since the last one that got further."""
    failures, since = 0, 0
    for progressed in progress:
        since = 1 if progressed else since + 1
        verdict = decide(ending, retries=retries, failures=failures, progressed=progressed)
        assert verdict.again is (since <= retries)
        if not verdict.again:
            return
        failures = verdict.failures


def test_without_retries_a_failure_is_the_end() -> None:
    assert not decide(Ending.FAILED, retries=0, progressed=True).again


@given(st.integers(0, 10_000))
def test_waits_grow_and_are_bounded(failures: int) -> None:
    assert 0 < back_off(failures) <= back_off(failures + 1) <= LONGEST_WAIT_SECONDS
