"""The process that writes one rank's checkpoints, so that nothing of it runs in the trainer.

Requests and answers are `frames` on a socket; the state to be written lies in shared memory whose descriptors come
over it. One thread writes, at the lowest priority; a save that is overdue is driven on by another one at the
trainer's own priority (which nobody needs to be root for). It ends with its trainer: a part that is not committed by
then is invisible, and collected later.
"""

from __future__ import annotations

import mmap
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Generator
from contextlib import suppress
from typing import Any

from ray_tracking.checkpoint import frames
from ray_tracking.checkpoint import manifest as names
from ray_tracking.checkpoint.manifest import Manifest
from ray_tracking.checkpoint.memory import fault_in
from ray_tracking.checkpoint.nearby import Nearby
from ray_tracking.checkpoint.part import PartWriter, decode_key
from ray_tracking.checkpoint.sealing import Sealing
from ray_tracking.checkpoint.store import CheckpointStore
from ray_tracking.errors import RayTrackingError, StorageError
from ray_tracking.log import configure, get_logger
from ray_tracking.storage import reopen

log = get_logger()

_LOOK_SECONDS = 0.5


class _Job:
    """One part: its data files are written step by step, by whichever thread drives it."""

    def __init__(self, number: int, steps: Generator[None, None, Manifest], part: PartWriter, overdue: float) -> None:
        self.number = number
        self.part = part
        self.overdue = overdue
        self.may_commit = threading.Event()
        self.cancelled = False
        self.hurried = threading.Event()
        self._steps = steps
        self._driving = threading.Lock()
        self._written = threading.Event()
        self._manifest: Manifest | None = None
        self._error: Exception | None = None

    @property
    def is_written(self) -> bool:
        return self._written.is_set()

    def drive(self, *, hurry: bool = False) -> None:
        """Write until nothing is left, or until the job is taken over by the thread that hurries."""
        while not self._written.is_set() and (hurry or not self.hurried.is_set()):
            with self._driving:
                if self._written.is_set():
                    return
                try:
                    next(self._steps)
                except StopIteration as end:
                    self._manifest = end.value
                    self._written.set()
                except Exception as error:  # noqa: BLE001 - told to the trainer by `manifest`
                    self._error = error
                    self._written.set()

    def manifest(self) -> Manifest:
        """The manifest to commit, once all is written. Raises what writing raised."""
        self._written.wait()
        if self._error is not None:
            raise self._error
        assert self._manifest is not None
        return self._manifest


class WriterProcess:
    """See the module."""

    def __init__(self, connection: socket.socket, setup: dict[str, Any]) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._store = CheckpointStore(reopen(setup["uri"]), setup["folder"])
        self._strategy: dict[str, Any] | None = setup["strategy"]
        self._nearby = Nearby.from_setup(setup["nearby"])
        self._niceness = int(setup["niceness"])
        self._deadline = float(setup["deadline"])
        self._arenas: dict[int, memoryview] = {}
        self._jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._known: dict[int, _Job] = {}
        self._current: _Job | None = None

    def serve(self) -> None:
        """Until the trainer closes the connection or is gone."""
        for work in (self._work, self._hurry):
            threading.Thread(target=work, daemon=True, name=f"checkpoint-{work.__name__.strip('_')}").start()
        while (received := frames.receive(self._connection)) is not None:
            message, fd = received
            number = message.get("number", 0)
            if message["do"] == "map" and fd is not None:
                self._arenas[number] = memoryview(mmap.mmap(fd, message["size"]))
                os.close(fd)
                threading.Thread(target=self._map, args=(message,), daemon=True).start()
            elif message["do"] == "unmap":
                self._arenas.pop(number, None)
            elif message["do"] == "write":
                self._known[number] = self._job(message)
                self._jobs.put(message)
            elif number in self._known:
                self._known[number].cancelled = message["do"] == "cancel"
                self._known[number].may_commit.set()

    def _job(self, message: dict[str, Any]) -> _Job:
        manifest = names.decode_manifest(message["manifest"].encode("ascii"))
        files = {
            name: self._arenas[arena][begin : begin + size] for name, (arena, begin, size) in message["files"].items()
        }
        sealing = Sealing(message["compression"], decode_key(message["key"]))
        folder, storage = message["folder"], self._store.storage
        if self._nearby is not None:
            size = sum(len(view) for view in files.values())
            storage = self._nearby.copying(storage, folder, manifest.rank, size)
        part = PartWriter(storage, folder, sealing)

        def steps() -> Generator[None, None, Manifest]:
            self._store.clear(folder, manifest.rank, manifest.world_size)
            return (yield from part.write(manifest, files))

        return _Job(message["number"], steps(), part, time.monotonic() + self._deadline)

    def _map(self, message: dict[str, Any]) -> None:
        """At the trainer's own priority: at the lowest, a busy machine has not provided the pages by the first save."""
        memory = self._arenas.get(message["number"])
        if message["fault_in"] and memory is not None:
            fault_in(memory)
        self._answer({"mapped": message["number"]})

    # --- the thread that writes -----------------------------------------------------------------------------

    def _work(self) -> None:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self._niceness)
        while True:
            message = self._jobs.get()
            job = self._known[message["number"]]
            self._current = job
            try:
                answer = self._finish(job, keep_house=message["keep_house"])
            except RayTrackingError as error:
                answer = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
            except Exception as error:  # noqa: BLE001 - told to the trainer, which says it
                answer = {"error": "CheckpointError", "message": f"{type(error).__name__}: {error}", "hint": None}
            self._current = None
            del self._known[job.number]
            self._answer({"number": job.number, **answer})

    def _finish(self, job: _Job, *, keep_house: bool) -> dict[str, Any]:
        job.drive()
        manifest = job.manifest()
        job.may_commit.wait()
        if job.cancelled:
            return {"error": "CheckpointError", "message": "called off", "hint": None}
        job.part.commit(manifest)
        if keep_house and self._strategy is not None:
            self._keep_house(self._strategy)
        return {"manifest": names.encode_manifest(manifest).decode("ascii")}

    def _keep_house(self, rules: dict[str, Any]) -> None:
        # Here, at the lowest priority: what it needs takes as long to import as all the rest of the process does, which
        # starts when training has just begun, or begun again.
        from ray_tracking.checkpoint.retention import apply_retention
        from ray_tracking.checkpoint.strategy import CheckpointStrategy

        try:
            apply_retention(self._store, CheckpointStrategy(**rules))
        except StorageError as error:
            log.warning("old checkpoints not deleted; tried again after the next save", error=error.message)

    def _answer(self, message: dict[str, Any]) -> None:
        with self._sending, suppress(OSError):  # the trainer is gone: so are we, in a moment
            frames.send(self._connection, message)

    # --- the thread that hurries ----------------------------------------------------------------------------

    def _hurry(self) -> None:
        while True:
            time.sleep(_LOOK_SECONDS)
            job = self._current
            if job is not None and not job.is_written and time.monotonic() > job.overdue:
                log.warning("a checkpoint is overdue; it is written at full priority", deadline_seconds=self._deadline)
                job.hurried.set()
                job.drive(hurry=True)


def main() -> None:
    """The descriptor of the socket is the first argument; the first message is the setup."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the trainer's to act on: it closes the connection when it has ended
    connection = socket.socket(fileno=int(sys.argv[1]))
    started = frames.receive(connection)
    if started is not None:
        setup, _ = started
        configure(**setup["log"])
        try:
            process = WriterProcess(connection, setup)
        except RayTrackingError as error:
            frames.send(connection, {"failed": error.message})
        else:
            with suppress(ConnectionError):
                frames.send(connection, {"ready": os.getpid()})
                process.serve()
    os._exit(0)  # whatever thread is still at work: it belongs to a trainer that is gone
