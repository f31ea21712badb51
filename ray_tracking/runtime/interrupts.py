"""Ctrl-C and SIGTERM while Ray trains: both end the run in order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.train.v2.torch.torch_trainer import TorchTrainer

_ABORT_SECONDS = 15.0


class InterruptibleTrainer(TorchTrainer):
    """A TorchTrainer whose `fit` raises KeyboardInterrupt on Ctrl-C; Ray's own handler exits the process instead."""

    _controller: Any = None

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller

    def abort(self) -> None:
        """End the controller and its workers; waits a bounded time."""
        if self._controller is not None:
            try:
                ray.get(self._controller.abort.remote(), timeout=_ABORT_SECONDS)
            except (GetTimeoutError, RayError):
                return  # gone, which is what was asked for, or ended with the cluster


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """In the main thread, SIGTERM raises KeyboardInterrupt inside the block, and SIGINT does what Python does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, _interrupt),
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(_signum: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt("terminated")
