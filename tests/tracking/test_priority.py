from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest

from ray_tracking.tracking.priority import stand_back, wait_for_idle, wait_no_more

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="scheduling policies are Linux's")

Standing = tuple[int, int]


def here() -> Standing:
    """Niceness and policy of the calling thread."""
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), os.sched_getscheduler(0)


def elsewhere(begin: Callable[[], object]) -> tuple[object, Standing, Standing]:
    """What `begin` returns on a thread of its own; how that thread stands then, and one that it starts."""
    found: list[object] = []

    def run() -> None:
        found.append(begin())
        found.append(here())
        below = threading.Thread(target=lambda: found.append(here()))
        below.start()
        below.join()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    answer, itself, below = found
    return answer, itself, below  # type: ignore[return-value]


def test_the_thread_and_those_it_starts_stand_back_and_no_other() -> None:
    _, itself, below = elsewhere(stand_back)
    assert itself == below == (19, os.SCHED_BATCH)
    assert here()[1] == os.SCHED_OTHER


def test_what_nobody_waits_for_runs_when_the_processor_is_idle() -> None:
    _, itself, below = elsewhere(wait_for_idle)
    assert itself[1] == below[1] == os.SCHED_IDLE
    assert here()[1] == os.SCHED_OTHER


def test_somebody_waits_for_it_after_all() -> None:
    idle, waited = threading.Event(), threading.Event()
    found: list[Standing] = []

    def run() -> None:
        wait_for_idle()
        found.append(here())
        idle.set()
        waited.wait(30)
        found.append(here())

    thread = threading.Thread(target=run)
    thread.start()
    assert idle.wait(30)
    assert thread.native_id is not None
    wait_no_more(thread.native_id)
    waited.set()
    thread.join()
    assert [policy for _, policy in found] == [os.SCHED_IDLE, os.SCHED_BATCH]
    assert here()[1] == os.SCHED_OTHER


@pytest.mark.parametrize(("niceness", "allowed"), [(0, False), (9, False), (10, True), (15, True), (19, True)])
def test_only_beside_workers_as_nice_as_rays_may_it_stand_back_so_far(niceness: int, allowed: bool) -> None:
    def nicer_by_then() -> bool:
        os.nice(niceness - os.nice(0))
        return stand_back()

    if here()[0] > niceness:
        pytest.skip(f"the tests themselves run at niceness {here()[0]}")
    answer, _, _ = elsewhere(nicer_by_then)
    assert answer is allowed
