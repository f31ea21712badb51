from __future__ import annotations

import os
import threading

import pytest

from ray_tracking.tracking.priority import stand_back


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="scheduling policies are Linux's")
def test_the_thread_and_those_it_starts_stand_back_and_no_other() -> None:
    found: dict[str, tuple[int, int]] = {}

    def look(name: str) -> None:
        found[name] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), os.sched_getscheduler(0)

    def begin() -> None:
        stand_back()
        look("itself")
        below = threading.Thread(target=look, args=("below",))
        below.start()
        below.join()

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    look("here")
    assert found["itself"] == found["below"] == (19, os.SCHED_BATCH)
    assert found["here"][1] == os.SCHED_OTHER
