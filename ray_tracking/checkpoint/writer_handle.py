"""A running checkpoint writer as its trainer sees it: requests, and answers to come."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from concurrent.futures import Future
from typing import Any

from ray_tracking import errors
from ray_tracking.checkpoint import frames
from ray_tracking.checkpoint.memory import Arena
from ray_tracking.errors import CheckpointError, RayTrackingError

_START_SECONDS = 60.0


class WriterEndedError(Exception):
    """The writer process is gone; nothing of its last request counts."""


class WriterHandle:
    """Starts a writer process and talks to it; a thread of its own takes the answers. Thread-safe."""

    def __init__(self, setup: dict[str, Any]) -> None:
        ours, theirs = socket.socketpair()
        # The trainer's sys.path: what it can import, its writer can. No session of its own: with the kernel's
        # autogroup that would be a share of the processor of its own, whatever its niceness.
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; from ray_tracking.checkpoint.writer_process import main; main()"
        )
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                process_group=0,  # Ctrl-C is for the trainer, which then closes the writer in order
            )
        self.pid = self._process.pid
        self.has_ended = False
        self._connection = ours
        self._sending = threading.Lock()
        self._number = 0
        self._answers: dict[tuple[str, int], Future[Any]] = {}
        try:
            frames.send(ours, setup)
            ours.settimeout(_START_SECONDS)
            received = frames.receive(ours)
            ours.settimeout(None)
        except OSError as error:
            self._process.kill()
            raise CheckpointError(f"The checkpoint writer does not start: {error}") from error
        if received is None or "failed" in received[0]:
            status = self._process.wait()
            reason = f"exit status {status}" if received is None else received[0]["failed"]
            raise CheckpointError(f"The checkpoint writer does not start: {reason}")
        threading.Thread(target=self._listen, name="checkpoint-answers", daemon=True).start()

    def ask(self, message: dict[str, Any]) -> tuple[int, Future[Any]]:
        """Send a request; its number, and its answer to come."""
        with self._sending:
            self._number += 1
            return self._number, self._send({**message, "number": self._number}, ("number", self._number))

    def map(self, number: int, arena: Arena, *, fill: bool) -> Future[Any]:
        with self._sending:
            message = {"do": "map", "number": number, "size": arena.size, "fault_in": fill}
            return self._send(message, ("mapped", number), arena.fd)

    def tell(self, message: dict[str, Any]) -> None:
        """Send what has no answer; lost if the process has ended."""
        with self._sending:
            try:
                frames.send(self._connection, message)
            except OSError:
                return

    def close(self) -> None:
        """End it; it has answered everything."""
        with self._sending:
            self._connection.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._connection.close()

    def _send(self, message: dict[str, Any], key: tuple[str, int], fd: int | None = None) -> Future[Any]:
        answer: Future[Any] = Future()
        if self.has_ended:
            answer.set_exception(WriterEndedError("it has ended"))
            return answer
        self._answers[key] = answer
        try:
            frames.send(self._connection, message, fd)
        except OSError as error:
            self._end(str(error))
        return answer

    def _listen(self) -> None:
        reason = "it closed the connection"
        try:
            while (received := frames.receive(self._connection)) is not None:
                message, _ = received
                key = next((kind, message[kind]) for kind in ("number", "mapped") if kind in message)
                answer = self._answers.pop(key, None)
                if answer is None:
                    continue
                if "error" in message:
                    answer.set_exception(_error_of(message))
                else:
                    answer.set_result(message)
        except (OSError, ValueError) as error:
            reason = str(error)
        self._end(reason)

    def _end(self, reason: str) -> None:
        self.has_ended = True
        while True:
            try:
                _, answer = self._answers.popitem()
            except KeyError:  # none is left; another thread may be at this, too
                return
            status = self._process.poll()
            answer.set_exception(WriterEndedError(reason if status is None else f"exit status {status}"))


def _error_of(message: dict[str, Any]) -> RayTrackingError:
    kind = getattr(errors, message["error"], CheckpointError)
    error: RayTrackingError = kind(message["message"], hint=message["hint"])
    return error
