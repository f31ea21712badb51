from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ray_tracking.errors import RunFailedError
from ray_tracking.runtime.sweep.mailbox import FIRST, Answer, Mailbox

SOON = 60.0
"""Reached only where something fails."""


def in_background(call: Any, *arguments: Any) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call(*arguments)))
    thread.start()
    return thread, found


def test_a_report_is_answered_once_ray_tune_asks_for_the_next():
    box = Mailbox()
    rank, answers = in_background(box.report, (1, 1), {"loss": 1.0}, SOON)
    assert box.next(FIRST, SOON) == ((1, 1), {"loss": 1.0})
    assert box.is_waiting
    assert rank.is_alive()  # Tune has not decided yet
    assert box.next((1, 1), 0.0) is None
    rank.join(SOON)
    assert answers == [Answer.GO_ON]
    assert not box.is_waiting


def test_who_waits_too_long_asks_again_and_nothing_is_told_twice():
    box = Mailbox()
    assert box.report((1, 1), "a", 0.0) is None
    assert box.report((1, 1), "a", 0.0) is None
    assert box.next(FIRST, 0.0) == ((1, 1), "a")
    assert box.next((1, 1), 0.0) is None
    assert box.report((1, 1), "a", 0.0) is Answer.GO_ON


def test_a_hub_that_was_started_anew_learns_from_both_sides():
    box = Mailbox()  # the one before had told Tune of (1, 1) and lost (1, 2)
    assert box.next((1, 1), 0.0) is None
    assert box.report((1, 1), "a", 0.0) is Answer.GO_ON
    assert box.report((1, 2), "b", 0.0) is None
    assert box.next((1, 1), 0.0) == ((1, 2), "b")


def test_the_reports_of_a_later_attempt_come_after_those_of_an_earlier_one():
    box = Mailbox()
    box.report((1, 7), "dead", 0.0)
    assert box.report((2, 1), "alive", 0.0) is None
    assert box.next((1, 7), 0.0) == ((2, 1), "alive")


def test_an_end_waits_for_what_rank_0_still_writes():
    box = Mailbox()
    rank, answers = in_background(box.report, (1, 1), "a", SOON)
    assert box.next(FIRST, SOON) is not None
    assert not box.end(0.0)
    rank.join(SOON)
    assert answers == [Answer.END]
    box.ended()
    assert box.end(0.0)


def test_the_trials_process_is_told_to_fail_at_once():
    box = Mailbox()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(box.next, FIRST, 2 * SOON)
        box.fail("hung")
        with pytest.raises(RunFailedError, match="hung"):
            waiting.result(SOON)
