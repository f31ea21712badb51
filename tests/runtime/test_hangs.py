"""The watch over a rank's own thread: what it reports, whom it ends. Ranks are threads here, the tracker a Roll."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from ray_tracking.runs.process import Process, this_process
from ray_tracking.runtime import hangs
from ray_tracking.runtime.hangs import HangWatch, Pulse, RankHungError, all_stacks
from ray_tracking.tracking.hangs import Report, Roll
from ray_tracking.tracking.transport import TransportError
from tests.tracking.fakes import wait_until

LIMIT = 1.2
PATIENCE = 60.0
"""Reached only where something fails."""


class Awake:
    """A clock of the seconds in which this process ran: where the machine stands still, no rank has been silent."""

    def __init__(self) -> None:
        self._now = 1000.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)
        self._thread.start()

    def _tick(self) -> None:
        last = time.monotonic()
        while not self._over.wait(0.02):
            now = time.monotonic()
            self._now += min(now - last, 0.1)
            last = now

    def monotonic(self) -> float:
        return self._now

    def stop(self) -> None:
        self._over.set()
        self._thread.join(PATIENCE)


class RollTransport:
    """The tracker's part, in this process."""

    def __init__(self, clock: Awake) -> None:
        self.roll = Roll()
        self.clock = clock
        self.heard: list[tuple[int, Report]] = []
        self.away = False

    def call(self, method: str, *arguments: Any, timeout: float | None = None) -> Any:
        assert method == "hear_rank"
        if self.away:
            raise TransportError("restarting")
        group, rank, world_size, report, limit = arguments
        self.heard.append((rank, report))
        return self.roll.hear(group, rank, world_size, report, limit, self.clock.monotonic())


class Ranks:
    """Threads that each run a body under a watch; `failures` by rank."""

    def __init__(self, clock: Awake) -> None:
        self.transport = RollTransport(clock)
        self.failures: dict[int, tuple[Exception, str]] = {}
        self.released = threading.Event()
        self._threads: list[threading.Thread] = []
        self._size = 0

    def start(self, *bodies: Any, world_size: int | None = None, limit: float | None = LIMIT) -> None:
        self._size = world_size or len(bodies)
        for rank, body in enumerate(bodies):
            thread = threading.Thread(target=self._run, args=(rank, body, limit), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _run(self, rank: int, body: Any, limit: float | None) -> None:
        pulse = Pulse()
        watch = HangWatch(
            self.transport,  # type: ignore[arg-type]
            pulse,
            group="g",
            rank=rank,
            world_size=self._size,
            limit=limit,
            fail=lambda error, stack: self.failures.update({rank: (error, stack)}),
        )
        watch.start()
        try:
            body(pulse, self.released)
        finally:
            watch.stop()

    def wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self.failures and time.monotonic() < end:
            time.sleep(0.05)

    def end(self) -> None:
        self.released.set()
        for thread in self._threads:
            thread.join(10.0)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    clock = Awake()
    ours = SimpleNamespace(
        monotonic=clock.monotonic,
        clock_gettime=time.clock_gettime,
        pthread_getcpuclockid=time.pthread_getcpuclockid,
    )
    monkeypatch.setattr(hangs, "time", ours)
    monkeypatch.setattr(hangs, "end", lambda process: None)  # it is this one
    made = Ranks(clock)
    yield made
    made.end()
    clock.stop()


def steps_a_while(pulse: Pulse, released: threading.Event) -> None:
    end = time.monotonic() + 3 * LIMIT
    while time.monotonic() < end and not released.is_set():
        pulse.count += 1
        pulse.step += 1
        time.sleep(0.05)


def sleeps_in_step_1(pulse: Pulse, released: threading.Event) -> None:
    pulse.step = 1
    released.wait()


def waits_for_others(pulse: Pulse, released: threading.Event) -> None:
    """Stands in a frame whose file is one of the waiting places, as in a backward pass."""
    pulse.step = 1
    code = compile("released.wait()", "/site-packages/torch/autograd/graph.py", "exec")
    exec(code, {"released": _Slow(released)})


class _Slow:
    """Waits in C, so that the innermost Python frame is the caller's."""

    def __init__(self, released: threading.Event) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        threading.Thread(target=lambda: (released.wait(), self._lock.release()), daemon=True).start()
        self.wait = self._lock.acquire


def test_the_rank_that_sleeps_is_ended_with_its_stack(ranks: Ranks) -> None:
    ranks.start(waits_for_others, sleeps_in_step_1)
    ranks.wait(PATIENCE)
    assert set(ranks.failures) == {1}
    error, stack = ranks.failures[1]
    assert isinstance(error, RankHungError)
    assert str(error).startswith(f"rank 1 ({this_process()}) hung at step 1: no progress for")
    assert "in sleeps_in_step_1" in stack.split("\n\n")[0], "the training thread comes first"


def test_progress_and_log_calls_are_no_hang(ranks: Ranks) -> None:
    ranks.start(steps_a_while, steps_a_while)
    ranks.wait(3 * LIMIT)
    assert not ranks.failures


def test_without_a_limit_nothing_is_watched(ranks: Ranks) -> None:
    ranks.start(sleeps_in_step_1, limit=None)
    ranks.wait(2 * LIMIT)
    assert not ranks.failures
    assert not ranks.transport.heard


def test_one_that_never_comes_is_named_by_another(ranks: Ranks) -> None:
    ranks.start(waits_for_others, world_size=2)
    ranks.wait(PATIENCE)
    assert "rank 1 hung: it never came" in str(ranks.failures[0][0])


def test_a_tracker_that_is_away_judges_nobody(ranks: Ranks) -> None:
    ranks.transport.away = True
    ranks.start(waits_for_others, sleeps_in_step_1)
    ranks.wait(2 * LIMIT)
    assert not ranks.failures
    ranks.transport.away = False
    ranks.wait(PATIENCE)
    assert set(ranks.failures) == {1}


def test_a_thread_that_computes_is_told_from_one_that_sleeps(ranks: Ranks) -> None:
    def computes(pulse: Pulse, released: threading.Event) -> None:
        pulse.step = 1
        while not released.is_set():
            sum(range(10_000))

    def last() -> dict[int, Report]:
        """Of each rank, once it has stood still for long enough to tell."""
        return {rank: report for rank, report in ranks.transport.heard if report.idle > LIMIT / 2}

    ranks.start(computes, sleeps_in_step_1)
    wait_until(lambda: len(last()) == 2, PATIENCE)
    assert {rank: report.computes for rank, report in last().items()} == {0: True, 1: False}


def test_a_process_that_does_not_answer_is_looked_at_and_ended() -> None:
    code = "import time\ndef naps(): print(flush=True); time.sleep(600)\nnaps()"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        other = _process_of(child.pid)
        assert child.stdout is not None
        child.stdout.readline()
        os.kill(child.pid, signal.SIGSTOP)
        said = hangs.stack_of(other, 1)
        assert said.startswith("rank 1:")
        assert "naps" in said or "no stack could be had" in said  # py-spy may be missing, or not allowed to look
        hangs.end(Process(other.host, other.pid, other.boot, other.namespace, "another start"))
        assert child.poll() is None, "another process by now"
        hangs.end(other)
        assert child.wait(PATIENCE) == -signal.SIGKILL
        assert "its process has ended" in hangs.stack_of(other, 1)
    finally:
        child.kill()
    away = Process("elsewhere", child.pid, "another boot", "x", "1")
    assert "runs on another host" in hangs.stack_of(away, 1)


def _process_of(pid: int) -> Process:
    from ray_tracking.runs import process

    here = this_process()
    return Process(here.host, pid, here.boot, here.namespace, process._start(pid) or "")


def test_stacks_name_threads() -> None:
    first = threading.get_ident()
    text = all_stacks(first)
    assert text.startswith("the training thread:\n")
    assert "test_stacks_name_threads" in text
