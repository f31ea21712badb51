"""`--retries N`: a process that starts the run's driver as a child, and starts it again when it has died or failed.

What goes on in the cluster is Ray's to recover; this is for what Ray can't: its controller, the driver, the head. Only
the run's storage is looked at, by the run's id.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from types import FrameType

    from ray_tracking.runs.store import RunStore
    from ray_tracking.runtime.retrying import Ending

Retries = Annotated[
    int,
    typer.Option(
        "--retries", metavar="N", min=0, help="Start again when the driver died or the run failed: N times in a row."
    ),
]
_REFUSALS = (2, 3)
_INTERRUPTED = 130
_AWAY_SECONDS = 3600.0
"""How long a cluster, or a storage, that was there before is waited for."""


def driver_command(*arguments: str | None, options: Sequence[tuple[str, object]] = ()) -> list[str]:
    """The command line of a driver. Options that are None or False are left out, lists repeated."""
    command = [sys.executable, "-m", "ray_tracking", *(argument for argument in arguments if argument is not None)]
    for name, value in options:
        if value is True:
            command.append(name)
        elif value is not None and value is not False:
            for each in value if isinstance(value, list) else [value]:
                command += [name, str(each)]
    return command


def supervise(command: Sequence[str], store: RunStore, run_id: str, retries: int) -> int:
    """Run the driver until the run is through, or is not to be started again. Returns the exit status. Main thread."""
    from ray_tracking.log import get_logger
    from ray_tracking.runtime.retrying import Ending, back_off, decide

    log = get_logger()
    failures, best = 0, newest_step(store, run_id)
    begun, refusals, away_since = False, 0, 0.0
    with _Signals() as signals:
        while True:
            code = signals.run(command)
            ending = Ending.STOPPED if signals.came else ending_of(code, _status(store, run_id))
            if code == 2 and ending is Ending.REFUSED and begun:
                # It was not refused before: what it needs is away, the cluster or the storage.
                away_since = away_since if refusals else time.monotonic()
                refusals += 1
                if time.monotonic() - away_since < _AWAY_SECONDS:
                    wait = back_off(refusals)
                    log.warning("the driver was refused; it may only be for now", run=run_id, again_in_seconds=wait)
                    signals.wait(wait)
                    if not (signals.came or _is_stop_requested(store, run_id)):
                        continue
            begun, refusals = begun or ending is not Ending.REFUSED, 0
            step = newest_step(store, run_id)
            verdict = decide(ending, retries=retries, failures=failures, progressed=step > best)
            failures, best = verdict.failures, max(step, best)
            if not verdict.again:
                if ending in (Ending.FAILED, Ending.LOST):
                    log.error("the run is not started again", run=run_id, why=verdict.why)
                return 0 if ending is Ending.COMPLETED else code if code >= 0 else 1
            log.warning(
                f"the driver {_how(code)}; it is started again",
                run=run_id,
                in_seconds=verdict.wait,
                checkpoint=step if step >= 0 else "none",
                **{"try": verdict.why},
            )
            signals.wait(verdict.wait)
            if signals.came or _is_stop_requested(store, run_id):
                log.warning("the run is not started again: it was asked to stop", run=run_id)
                return 1


def ending_of(code: int, status: str | None) -> Ending:
    """What an exit status of a driver and the status in the run's record (None: there is no record) mean. Pure."""
    from ray_tracking.runtime.retrying import Ending

    if code in _REFUSALS:
        return Ending.REFUSED
    if code == 0 or status == "completed":  # a driver may die after it has recorded the end
        return Ending.COMPLETED
    if code == _INTERRUPTED or status == "aborted":
        return Ending.STOPPED
    return Ending.FAILED if code == 1 else Ending.LOST


def newest_step(store: RunStore, run_id: str) -> int:
    """The step of the newest checkpoint, -1 if there is none or it can't be seen now."""
    from ray_tracking.checkpoint import CheckpointStore
    from ray_tracking.errors import RayTrackingError

    try:
        infos = CheckpointStore(store.directory(run_id)).checkpoints()
    except (RayTrackingError, OSError):
        return -1
    return max((info.step for info in infos), default=-1)


def _status(store: RunStore, run_id: str) -> str | None:
    from ray_tracking.errors import RayTrackingError

    try:
        return store.load(run_id).status.value if store.exists(run_id) else None
    except RayTrackingError:
        return None


def _is_stop_requested(store: RunStore, run_id: str) -> bool:
    from ray_tracking.errors import RayTrackingError
    from ray_tracking.runs import stopping

    try:
        return stopping.requested(store.directory(run_id)) is not None
    except RayTrackingError:
        return False


def _how(code: int) -> str:
    if code >= 0:
        return "has failed" if code == 1 else f"has ended with exit status {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


class _Signals:
    """Passes on what is to end the program to the driver of the moment, and ends a wait for the next one.

    The driver has a process group of its own: else Ctrl-C would reach it twice, which means "at once".
    """

    def __init__(self) -> None:
        self.came = False
        self._driver: subprocess.Popen[bytes] | None = None
        self._woken = threading.Event()

    def __enter__(self) -> _Signals:
        self._before = {
            number: signal.signal(number, self._pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str]) -> int:
        """The exit status; negative: the signal that killed it."""
        self._driver = subprocess.Popen(command, process_group=0)
        if self.came:
            self._driver.send_signal(signal.SIGTERM)
        return self._driver.wait()

    def wait(self, seconds: float) -> None:
        self._woken.wait(seconds)

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        self.came = True
        self._woken.set()
        if self._driver is not None:
            self._driver.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)
