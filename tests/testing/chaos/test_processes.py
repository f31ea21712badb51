from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_tracking.testing.chaos.plan import Part
from ray_tracking.testing.chaos.processes import Launched, Process, await_end, descendants, snapshot
from tests.tracking.fakes import wait_until

FAMILY = '''
import os, subprocess, sys, time
subprocess.Popen(["ray::RayTrainWorker.run", "1000"], executable="/bin/sleep")
subprocess.Popen(["ray::TrackerActor", "1000"], executable="/bin/sleep")
# a parent that ends: its child is nobody's then, but still ours
code = """import subprocess, sys
title = "# ray_tracking.checkpoint." + "writer_process"
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)  " + title])
sys.stdin.read()"""
parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
print("begun", flush=True)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.02)
parent.stdin.close()
parent.wait()
print("orphaned", flush=True)
time.sleep(1000)
'''


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Launched]:
    driver = Launched([sys.executable, "-c", FAMILY, str(tmp_path / "go")], os.environ, tmp_path / "output")
    yield driver
    driver.kill_all()


def until(driver: Launched, part: Part) -> list[Process]:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if found := driver.find(part):
            return found
        time.sleep(0.02)
    raise AssertionError(f"no {part}: {driver.tail()}")


def test_descendants_are_found_whatever_their_order() -> None:
    table = {
        pid: Process(pid, parent, 0, "")
        for pid, parent in ((9, 1), (4, 9), (3, 4), (5, 9), (2, 3), (7, 1), (8, 7), (1, 0))
    }
    assert [process.pid for process in descendants([9], table)] == [4, 5, 3, 2]
    assert descendants([2], table) == []


def test_parts_are_found_and_one_alone_is_killed(family: Launched) -> None:
    (worker,) = until(family, Part.WORKER)
    (tracker,) = until(family, Part.TRACKER)
    worker.send(signal.SIGKILL)
    await_end([worker])
    assert family.find(Part.WORKER) == []
    assert family.find(Part.TRACKER) == [tracker]
    assert family.status is None


def test_everything_is_killed_with_the_driver_and_nothing_else(family: Launched, tmp_path: Path) -> None:
    bystander = subprocess.Popen(["ray::RayTrainWorker.other", "1000"], executable="/bin/sleep")
    try:
        until(family, Part.WORKER)
        (writer,) = until(family, Part.WRITER)
        (tmp_path / "go").touch()  # now that it was seen it is remembered
        wait_until(lambda: "orphaned" in family.tail(), 60)
        killed = {process.pid for process in family.kill_all()}
        assert {family.pid, writer.pid} <= killed
        assert family.status == -signal.SIGKILL
        assert not killed & set(snapshot())
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_process_is_not_mistaken_for_a_later_one_of_its_id() -> None:
    me = snapshot()[os.getpid()]
    assert me.is_alive
    assert not Process(me.pid, me.parent, me.started + 1, me.command).is_alive


def test_a_process_that_has_ended_but_was_not_waited_for_is_dead() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert ended.stdout is not None
    ended.stdout.read()
    end = time.monotonic() + 60
    while ended.pid in snapshot() and time.monotonic() < end:
        time.sleep(0.01)
    assert ended.pid not in snapshot()
    ended.wait()
