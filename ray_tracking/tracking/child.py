"""The tracker as a child process, for plain scripts and notebooks: the same service over a pipe.

Run as `python -m ray_tracking.tracking.child`. Requests come on stdin and answers go to stdout, one at a time, each
a length and a marshalled tuple. Its end is the parent's: when stdin closes without `close`, the parent has died,
and the run is closed as interrupted.
"""

from __future__ import annotations

import marshal
import os
import struct
import subprocess
import sys
import threading
from typing import IO, Any

from ray_tracking.errors import RayTrackingError
from ray_tracking.log import configure, get_logger
from ray_tracking.tracking.spec import TrackerSpec
from ray_tracking.tracking.transport import TransportError

log = get_logger()

_LENGTH = struct.Struct("<Q")
_NICENESS = 10


def _send(stream: IO[bytes], message: Any) -> None:
    data = marshal.dumps(message)
    stream.write(_LENGTH.pack(len(data)))
    stream.write(data)
    stream.flush()


def _receive(stream: IO[bytes]) -> Any:
    """The next message; None at the end of the stream."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    data = stream.read(length)
    return marshal.loads(data) if len(data) == length else None  # noqa: S302 - our own child, our own pipe


class ChildTransport:
    """Starts the tracker process and talks to it; a tracker that died is started again."""

    def __init__(self, spec: TrackerSpec) -> None:
        self._spec = spec
        self._lock = threading.Lock()
        self._closed = False
        self._process = self._start()

    def append(self, rank: int, attempt: int, batch: bytes) -> int:
        return int(self._request("append", rank, attempt, batch))

    def call(self, method: str, *arguments: Any, timeout: float | None = None) -> Any:
        return self._request(method, *arguments)

    def close(self) -> None:
        self._closed = True
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()  # a backend that hangs at exit; all it had is in the journal

    def _start(self) -> subprocess.Popen[bytes]:
        # An own session: Ctrl-C in the terminal is for the script, which then closes the tracker in order.
        process = subprocess.Popen(
            [sys.executable, "-m", "ray_tracking.tracking.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            _send(process.stdin, self._spec.to_json())
            answer = _receive(process.stdout)
        except OSError as error:
            raise TransportError(f"the tracker process did not start: {error}") from error
        if answer is None:
            raise TransportError(f"the tracker process ended at its start with status {process.wait()}")
        _raise_if_error(answer)
        return process

    def _request(self, method: str, *arguments: Any) -> Any:
        with self._lock:
            if self._process.poll() is not None:
                if self._closed:
                    raise TransportError("the tracker is closed")
                log.warning("the tracker process died; starting it again", status=self._process.returncode)
                self._process = self._start()
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            try:
                _send(self._process.stdin, (method, arguments))
                answer = _receive(self._process.stdout)
            except (OSError, ValueError) as error:
                raise TransportError(f"the tracker process does not answer: {error}") from error
        if answer is None:
            raise TransportError("the tracker process ended")
        return _raise_if_error(answer)


def _raise_if_error(answer: tuple[str, Any]) -> Any:
    kind, value = answer
    if kind == "ok":
        return value
    if kind == "storage":
        raise TransportError(value)
    import ray_tracking.errors as errors

    raise getattr(errors, kind, RayTrackingError)(value)


def main() -> None:
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a backend prints goes to stderr, never between the answers
    text = _receive(requests)
    if text is None:
        return
    spec = TrackerSpec.from_json(text)
    configure(spec.log_level, json=spec.log_json)
    os.nice(_NICENESS)
    from ray_tracking.tracking.service import TrackerService

    try:
        service = TrackerService(spec)
    except RayTrackingError as error:
        _send(answers, (type(error).__name__, str(error)))
        return
    _send(answers, ("ok", None))
    closed = False
    while (request := _receive(requests)) is not None:
        method, arguments = request
        try:
            answer = ("ok", getattr(service, method)(*arguments))
        except RayTrackingError as error:
            kind = "storage" if method == "append" else type(error).__name__
            answer = (kind, str(error))
        closed = closed or method == "close"
        try:
            _send(answers, answer)
        except OSError:
            break  # the parent has died
    if not closed:
        service.close("aborted", "the process that tracked ended without finalize_experiment()")
    sys.stderr.flush()
    os._exit(0)  # a backend's thread that hangs must not keep the process


if __name__ == "__main__":
    main()
