"""The watch over one rank: how long its training thread has stood still, and its end if it holds up the others.

A daemon thread wakes a few times per `hang_timeout_secs`, looks at counters that training advances anyway, and tells
the tracker, which knows of all ranks. Ray restarts the group when a rank's failure is put into its queue.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from ray_tracking.errors import RayTrackingError, RunFailedError
from ray_tracking.log import get_logger
from ray_tracking.runs.process import Process, is_certainly_dead, is_here, this_process
from ray_tracking.tracking.hangs import Report, Verdict
from ray_tracking.tracking.transport import Transport, TransportError

log = get_logger()

_LOOKS = 6
"""Looks per time-out."""
_LEAST_SECONDS, _MOST_SECONDS = 0.2, 10.0
_BUSY_SHARE = 0.02
_ANSWER_SECONDS, _LAST_SECONDS = 5.0, 1.0
_DUMP_SECONDS = 10.0
_STACK_CHARACTERS = 12_000
_WAITING_PLACES = (
    "torch/distributed/",
    "torch/autograd/",
    "torch/nn/parallel/",
    "torch/cuda/",
    "ray/train/",
    "ray_tracking/runtime/collective.py",
)
"""Where a thread stands that waits for other ranks: a backward pass of DDP does it inside autograd."""
_MEANS_OF_WAITING = ("/ray/_private/", "/ray/_common/", "/threading.py", "/concurrent/futures/", "/contextlib.py")


class RankHungError(RunFailedError):
    """A rank made no progress for too long while others waited for it."""


class Pulse:
    """What training advances as it goes: plain attributes, so that a step pays an addition."""

    def __init__(self) -> None:
        self.count = 0
        self.step = 0
        """Steps begun by this process: 0 before its first."""
        self.at_storage = False

    @contextmanager
    def storing(self) -> Iterator[None]:
        """Around a restore or a save, which may take its time on a slow storage."""
        self.count += 1
        self.at_storage = True
        try:
            yield
        finally:
            self.at_storage = False
            self.count += 1


class HangWatch:
    """Watches the thread that makes it, between `start` and `stop`. Does nothing without a `limit`.

    `group`: what the ranks of one start have in common, and no others. `logged`: a number that moves with log calls.
    `fail` hands an exception and a stack to whoever ends the group.
    """

    def __init__(
        self,
        transport: Transport,
        pulse: Pulse,
        *,
        group: str,
        rank: int,
        world_size: int,
        limit: float | None,
        fail: Callable[[Exception, str], object],
    ) -> None:
        self.logged: Callable[[], int] = lambda: 0
        self.step: Callable[[], int] = lambda: pulse.step
        """Where the run stands, for people."""
        self._transport = transport
        self._pulse = pulse
        self._group = group
        self._rank = rank
        self._world_size = world_size
        self._limit = limit
        self._fail = fail
        self._process = this_process()
        self._training = threading.get_ident()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ray-tracking-hangs", daemon=True)
        self._mark: tuple[int, int] = (-1, -1)
        self._since = time.monotonic()
        self._busy = 0.0

    def start(self) -> None:
        if self._limit is not None:
            self._thread.start()

    def stop(self) -> None:
        """The training function has returned; those who still wait for this rank are told why it does not come."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(_LAST_SECONDS)
            with suppress(TransportError, RayTrackingError):
                self._tell(replace(self._look(), over=True), _LAST_SECONDS)

    def _watch(self) -> None:
        assert self._limit is not None
        pause = min(max(self._limit / _LOOKS, _LEAST_SECONDS), _MOST_SECONDS)
        while True:
            try:
                verdict = self._tell(self._look())
            except (TransportError, RayTrackingError):
                verdict = None  # the tracker restarts: then nobody can be judged
            if verdict is not None and not self._over.is_set() and self._act(verdict):
                return
            if self._over.wait(pause):
                return

    def _tell(self, report: Report, timeout: float = _ANSWER_SECONDS) -> Verdict | None:
        answer: Verdict | None = self._transport.call(
            "hear_rank",
            self._group,
            self._rank,
            self._world_size,
            report,
            self._limit,
            timeout=timeout,
        )
        return answer

    def _look(self) -> Report:
        now, mark = time.monotonic(), (self._pulse.count, self.logged())
        if mark != self._mark:
            self._mark, self._since, self._busy = mark, now, _processor_seconds(self._training)
        idle = now - self._since
        used = _processor_seconds(self._training) - self._busy
        return Report(
            step=self.step(),
            idle=idle,
            computes=used > _BUSY_SHARE * idle,
            waits=is_waiting(sys._current_frames().get(self._training)),
            patient=self._pulse.at_storage or self._pulse.step == 0,
            process=self._process,
        )

    def _act(self, verdict: Verdict) -> bool:
        """End the group if that is for this rank to do. Returns whether it was."""
        if self._rank not in verdict.actors:
            return False
        if verdict.is_for_others:
            stacks = [stack_of(process, rank) for rank, process in verdict.processes.items()]
            stack = "\n".join(stacks) or "no stack could be had"
            log.error("a rank hangs; the workers are started again", why=verdict.text, stack=stack)
        else:
            stack = all_stacks(self._training)
            log.error("this rank hangs; the workers are started again", why=verdict.text, stack=stack)
        self._fail(RankHungError(verdict.text), stack)
        for process in verdict.processes.values():
            end(process)  # Ray asks it to end by itself, which a stopped one does not
        return True


def is_waiting(frame: FrameType | None) -> bool:
    """Whether a thread that stands there waits for other ranks."""
    while frame is not None and any(place in frame.f_code.co_filename for place in _MEANS_OF_WAITING):
        frame = frame.f_back  # what matters is who waits by these means
    return frame is not None and any(place in frame.f_code.co_filename for place in _WAITING_PLACES)


def all_stacks(first: int) -> str:
    """The Python stacks of this process's threads, that of thread `first` before the others."""
    frames = sys._current_frames()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    texts = []
    for ident in sorted(frames, key=lambda ident: ident != first):
        name = "the training thread" if ident == first else f"thread {names.get(ident, ident)}"
        texts.append(f"{name}:\n" + "".join(traceback.format_stack(frames[ident])))
    return "\n".join(texts)[:_STACK_CHARACTERS]


def stack_of(process: Process, rank: int) -> str:
    """The stack of another rank that doesn't answer, if py-spy is installed on its host and may look."""
    if not is_here(process, this_process()):
        return f"rank {rank}: no stack could be had, it runs on another host"
    if is_certainly_dead(process, this_process()):
        return f"rank {rank}: no stack could be had, its process has ended"
    stack = _dumped(process.pid)
    return f"rank {rank}:\n{stack}" if stack else f"rank {rank}: no stack could be had, it is stopped or in C code"


def end(process: Process) -> None:
    """Kill a process, if it is on this host and still the one that is meant."""
    if is_here(process, this_process()) and not is_certainly_dead(process, this_process()):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(process.pid, signal.SIGKILL)


def _dumped(pid: int) -> str:
    """What py-spy sees of another process; "" where it is missing or not allowed to look."""
    beside = Path(sys.executable).with_name("py-spy")
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    if program is None:
        return ""
    try:
        command = [program, "dump", "--nonblocking", "--pid", str(pid)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DUMP_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout[:_STACK_CHARACTERS] if done.returncode == 0 else ""


def _processor_seconds(thread: int) -> float:
    """Processor time of a thread of this process so far; 0 where the system does not tell."""
    try:
        return time.clock_gettime(time.pthread_getcpuclockid(thread))
    except (AttributeError, OSError):
        return 0.0


def fail_group(error: Exception, stack: str) -> None:
    """On a Ray Train worker: its training thread counts as failed with `error`, whatever it stands in."""
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
    from ray.train.v2._internal.execution.context import get_train_context

    runner: Any = get_train_context().execution_context.training_thread_runner
    runner.get_exception_queue().put(UserExceptionWithTraceback(error, stack))


def group_of_ranks() -> str:
    """On a Ray Train worker: a name that the ranks of one start of the group share."""
    from ray.train.v2._internal.execution.context import get_train_context

    actor: Any = get_train_context().execution_context.synchronization_actor
    return str(actor._actor_id.hex())
