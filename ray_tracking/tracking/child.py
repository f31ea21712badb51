"""The tracker as a child process, for plain scripts and notebooks: the same service over a pipe.

Requests come on stdin and answers go to stdout, one at a time, each a length and a marshalled tuple. Its end is the
parent's: when stdin closes without `close`, or the parent is gone, the run is closed as aborted. Signals that end
the parent's process group are not for it: it has to bring home what the parent logged last.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from typing import Any

from ray_tracking import errors
from ray_tracking.errors import LeaseError, RayTrackingError
from ray_tracking.log import configure, get_logger
from ray_tracking.runs.process import Process
from ray_tracking.tracking.priority import stand_back
from ray_tracking.tracking.spec import TrackerSpec
from ray_tracking.tracking.transport import TransportError

log = get_logger()

_LENGTH = struct.Struct("<Q")
_START_SECONDS = 60.0
_POLL_SECONDS = 1.0
_CHUNK = 1 << 20
_RETRY = "retry"
"""The kind of an answer that says: not now, or not by this process."""


def _is_ready(descriptor: int, event: int) -> bool:
    """Wait a second at most. By poll: select() refuses descriptors from 1024 on."""
    poll = select.poll()
    poll.register(descriptor, event)
    return bool(poll.poll(_POLL_SECONDS * 1000))


class _Silent(Exception):
    """The other side said nothing in time."""


class _Pipe:
    """Messages over two file descriptors. `alive` is asked each second while waiting for one."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading = reading
        self._writing = writing
        # So that a write to a process that reads no more is bounded too; not our own stdin, others may share it.
        os.set_blocking(writing, False)

    def send(self, message: Any, end: float | None = None) -> None:
        """Raises OSError if nobody reads any more, _Silent if that takes beyond the monotonic time `end`."""
        data = marshal.dumps(message)
        for part in (memoryview(_LENGTH.pack(len(data))), memoryview(data)):
            while part:
                if not _is_ready(self._writing, select.POLLOUT):
                    if end is not None and time.monotonic() > end:
                        raise _Silent
                    continue
                with contextlib.suppress(BlockingIOError):
                    part = part[os.write(self._writing, part[:_CHUNK]) :]

    def receive(self, end: float | None = None, parent: int | None = None) -> Any:
        """The next message; None at the end of the stream. Raises _Silent as `send`.

        With `parent`, it is also the end when this process has another parent now: a process forked by the parent
        may still hold the other end of the pipe.
        """
        head = self._read(_LENGTH.size, end, parent)
        if head is None:
            return None
        data = self._read(_LENGTH.unpack(head)[0], end, parent)
        return None if data is None else marshal.loads(data)  # noqa: S302 - our own child, our own pipe

    def _read(self, size: int, end: float | None, parent: int | None) -> bytes | None:
        data = bytearray()
        while len(data) < size:
            if not _is_ready(self._reading, select.POLLIN):
                if end is not None and time.monotonic() > end:
                    raise _Silent
                if parent is not None and os.getppid() != parent:
                    return None
                continue
            part = os.read(self._reading, min(size - len(data), _CHUNK))
            if not part:
                return None
            data += part
        return bytes(data)


class ChildTransport:
    """Starts the tracker process and talks to it; a tracker that died is started again at the next request."""

    def __init__(self, spec: TrackerSpec) -> None:
        self._spec = spec
        self._lock = threading.Lock()
        self._closed = False
        self._number = 0
        self._process, self._pipe = self._start(spec)

    @property
    def pid(self) -> int:
        """The tracker process of now."""
        return self._process.pid

    def append(self, rank: int, attempt: int, batch: bytes) -> int:
        return int(self._request("append", (rank, attempt, batch), None))

    def call(self, method: str, *arguments: Any, timeout: float | None = None) -> Any:
        return self._request(method, arguments, timeout)

    def close(self, timeout: float = 10.0) -> None:
        """End the tracker process: it ends by itself when its stdin closes, or is killed after `timeout` seconds."""
        self._closed = True
        if not self._lock.acquire(timeout=timeout):
            self._process.kill()  # it hangs in a request; killed, it lets go of who waits for the answer
            self._lock.acquire()
        try:
            self._let_go()
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()  # a backend that hangs at exit; all it had is in the journal
            self._process.wait()
        finally:
            self._lock.release()

    def _start(self, spec: TrackerSpec) -> tuple[subprocess.Popen[bytes], _Pipe]:
        # The parent's sys.path, as multiprocessing does it: what the script can import, its tracker can.
        code = f"import sys; sys.path[:] = {sys.path!r}; from ray_tracking.tracking.child import main; main()"
        # An own session: Ctrl-C in the terminal is for the script, which then closes the tracker in order.
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        pipe = _Pipe(process.stdout.fileno(), process.stdin.fileno())
        end = time.monotonic() + _START_SECONDS
        try:
            pipe.send((os.getpid(), spec.to_json()), end)
            answer = pipe.receive(end)
        except (_Silent, OSError) as error:
            process.kill()
            answer, reason = None, f"it did not answer within {_START_SECONDS:.0f} s ({error})"
        else:
            reason = "it ended at once"
        if answer is None:
            raise TransportError(f"the tracker process did not start: {reason}, exit status {process.wait()}")
        try:
            _value_of(answer)
        except BaseException:
            process.wait()
            raise
        return process, pipe

    def _request(self, method: str, arguments: tuple[Any, ...], timeout: float | None) -> Any:
        end = None if timeout is None else time.monotonic() + timeout
        if not self._lock.acquire(timeout=-1 if timeout is None else timeout):
            raise TransportError(f"the tracker process is busy since {timeout:.0f} s")
        try:
            if self._closed:
                raise TransportError("the tracker is closed")
            if self._process.poll() is not None:
                log.warning("the tracker process died; starting it again", exit_status=self._process.returncode)
                self._let_go()
                # Where nobody can tell that it is dead, its lease runs out.
                patience = 0.0 if self._spec.lease else 1.5 * self._spec.lease_secs
                self._process, self._pipe = self._start(replace(self._spec, patience=patience))
            self._number += 1
            try:
                self._pipe.send((self._number, method, arguments), end)
                answer = self._pipe.receive(end)
                while answer is not None and answer[0] != self._number:
                    answer = self._pipe.receive(end)  # of an earlier request whose time had run out
            except _Silent:
                raise TransportError(f"the tracker process did not answer within {timeout:.0f} s") from None
            except OSError as error:
                self._end_of(self._process)
                raise TransportError(f"the tracker process can't be reached: {error}") from error
            if answer is None:
                self._end_of(self._process)
                raise TransportError("the tracker process ended")
        finally:
            self._lock.release()
        return _value_of(answer[1:])

    def _end_of(self, process: subprocess.Popen[bytes]) -> None:
        """Its pipe is at its end: so is the process, in a moment."""
        try:
            process.wait(5.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _let_go(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()


def _value_of(answer: tuple[str, Any]) -> Any:
    kind, value = answer
    if kind == "ok":
        return value
    if kind == _RETRY:
        raise TransportError(value)
    raise _error_of(kind, value)


def _plain(error: RayTrackingError) -> tuple[str, dict[str, Any]]:
    """An error as plain values; of its own attributes only a lease's holder matters to the other side."""
    values: dict[str, Any] = {"message": str(error)}
    if isinstance(error, LeaseError):
        values |= {"run": error.run, "epoch": error.epoch}
        values["process"] = None if error.process is None else asdict(error.process)
    return type(error).__name__, values


def _error_of(kind: str, values: dict[str, Any]) -> RayTrackingError:
    if values.get("process") is not None:
        values["process"] = Process(**values["process"])
    error: RayTrackingError = getattr(errors, kind, RayTrackingError)(**values)
    return error


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # a handler, not SIG_IGN: what backends start has the default again
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever a backend prints goes to stderr, never between the answers
    pipe = _Pipe(os.dup(0), answers)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # nor may it read our requests
    started = pipe.receive()
    if started is None:
        return
    parent, text = started
    spec = TrackerSpec.from_json(text)
    configure(spec.log_level, json=spec.log_json)
    stand_back()
    from ray_tracking.tracking.service import TrackerService

    try:
        service = TrackerService(spec)
    except RayTrackingError as error:
        pipe.send(_plain(error))
        return
    pipe.send(("ok", None))
    if not _serve(service, pipe, parent):
        with contextlib.suppress(RayTrackingError):
            service.close("aborted", "the process that tracked ended without finalize_experiment()")
    sys.stderr.flush()
    os._exit(0)  # a backend's thread that hangs must not keep the process


def _serve(service: Any, pipe: _Pipe, parent: int) -> bool:
    """Answer requests until the parent has no more. Returns whether it closed the run."""
    closed = False
    while (request := pipe.receive(parent=parent)) is not None:
        number, method, arguments = request
        try:
            answer = (number, "ok", getattr(service, method)(*arguments))
            closed = closed or method == "close"
        except RayTrackingError as error:
            final = method != "append" or isinstance(error, LeaseError)
            answer = (number, *(_plain(error) if final else (_RETRY, str(error))))
        except Exception as error:  # one request that fails must not end the tracker of the run
            log.error("a request to the tracker failed", method=method, exc_info=True)
            answer = (number, _RETRY, f"{type(error).__name__}: {error}")
        try:
            pipe.send(answer)
        except OSError:
            break  # the parent has died
    return closed
