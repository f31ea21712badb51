"""Ctrl-C and SIGTERM while Ray trains: the first asks for a checkpoint and an end in order, the second ends at once."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.train.v2.torch.torch_trainer import TorchTrainer

from ray_tracking.errors import RayTrackingError
from ray_tracking.log import get_logger
from ray_tracking.runtime.callbacks import as_runs_need_them
from ray_tracking.runtime.restarts import RestartPolicy
from ray_tracking.tracking.transport import Transport, TransportError

log = get_logger()

_ABORT_SECONDS = 15.0
_ORDERLY_SECONDS = 25.0
"""How long training may take to save and end: less than the half minute that schedulers give a process."""
_ASK_SECONDS = 0.5
_ANSWER_SECONDS = 3.0


class InterruptibleTrainer(TorchTrainer):
    """A TorchTrainer whose `fit` raises KeyboardInterrupt on Ctrl-C (Ray's own handler exits the process instead), and
    which starts its workers again as `restarts` says.
    """

    restarts: RestartPolicy
    _controller: Any = None

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        ours = {
            "failure_policy": self.restarts,
            "callbacks": as_runs_need_them(arguments["callbacks"], self),
        }
        return super()._initialize_and_run_controller(**{**arguments, **ours})

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller

    def abort(self) -> None:
        """End the controller and its workers; waits a bounded time."""
        if self._controller is not None:
            try:
                ray.get(self._controller.abort.remote(), timeout=_ABORT_SECONDS)
            except (GetTimeoutError, RayError):
                return  # gone, which is what was asked for, or ended with the cluster


class Interrupts:
    """`came`: a signal has asked for an end. Training that has begun is stopped through the tracker then, and the main
    thread gets a KeyboardInterrupt only if it takes too long, or at another signal.
    """

    def __init__(self, tracker: Transport) -> None:
        self.came = False
        self._tracker = tracker
        self._at_once = False
        self._signalled = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._stop_in_order, name="ray-tracking-interrupt", daemon=True)

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """In the main thread, SIGTERM and SIGINT are taken care of inside the block."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        self._thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._signalled.set()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, _signum: int, _frame: FrameType | None) -> None:
        # The main thread may be inside a call of Ray's: nothing is called or printed from here.
        if self.came or self._at_once:
            raise KeyboardInterrupt("terminated")
        self.came = True
        self._signalled.set()

    def _stop_in_order(self) -> None:
        self._signalled.wait()
        end = time.monotonic() + _ORDERLY_SECONDS
        said = False
        while not self._over.is_set() and time.monotonic() < end:
            try:
                begun = self._tracker.call("status", timeout=_ANSWER_SECONDS)["progress"].get("step")
                if not begun:
                    break  # there is nothing to save
                if not said:
                    log.warning("saving a last checkpoint before the end; interrupt again to end at once")
                    said = True
                self._tracker.call("request_stop", timeout=_ANSWER_SECONDS)
            except (TransportError, RayTrackingError):
                pass  # it restarts
            self._over.wait(_ASK_SECONDS)
        if not self._over.is_set():
            self._at_once = True
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
