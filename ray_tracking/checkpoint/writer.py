"""The trainer's side of writing checkpoints: buffers of shared memory, and the process that writes what lies in them.

In: descriptions of live state. Out: a copy, at once, and a future of the part on storage. The training thread copies;
one idle thread talks to the process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ray_tracking.checkpoint import manifest as names
from ray_tracking.checkpoint.keys import DataKey, Keyring
from ray_tracking.checkpoint.manifest import Manifest
from ray_tracking.checkpoint.memory import Arena, address_of, fault_in
from ray_tracking.checkpoint.nearby import Nearby
from ray_tracking.checkpoint.part import encode_key
from ray_tracking.checkpoint.staging import Stager
from ray_tracking.checkpoint.state import Description, Snapshot
from ray_tracking.checkpoint.store import CheckpointStore
from ray_tracking.checkpoint.strategy import CheckpointStrategy, as_mapping
from ray_tracking.checkpoint.writer_handle import WriterEndedError, WriterHandle
from ray_tracking.errors import CheckpointError, RayTrackingError
from ray_tracking.log import child_settings, get_logger

log = get_logger()

BUFFERS = 2
"""One to copy into while the other is being written."""
_QUEUE = 8
"""The most buffers with `when_busy: queue`."""
_DEADLINE_SECONDS = 60.0

WhenBusy = Literal["wait", "skip", "queue"]


@dataclass(frozen=True, slots=True)
class WriterOptions:
    """How parts are written. `niceness` of the writing thread; after `deadline` seconds a save is hurried."""

    when_busy: WhenBusy = "wait"
    compression: Literal["zstd"] | None = None
    keyring: Keyring | None = field(default=None, repr=False)
    niceness: int = 19
    deadline: float = _DEADLINE_SECONDS

    @classmethod
    def from_config(cls, section: Mapping[str, Any]) -> WriterOptions:
        """From `training.default`. Reads the keys of `encryption`: ConfigError if one can't be had."""
        encryption = section.get("encryption")
        return cls(
            section.get("when_busy") or "wait",
            section.get("compression"),
            None if encryption is None else Keyring.from_config(as_mapping(encryption)),
            deadline=float(section.get("write_deadline_secs") or _DEADLINE_SECONDS),
        )


@dataclass(slots=True)
class _Buffer:
    number: int
    arena: Arena
    free: bool = True
    sent_to: int | None = None
    """Process id of the writer that has it mapped."""


@dataclass(frozen=True, slots=True)
class Staged:
    """A copy of the state, waiting to be written."""

    snapshot: Snapshot
    buffer: _Buffer


class CheckpointWriter:
    """Copies and writes one rank's parts into `store`. `stage` and `write` are for the training thread.

    With `strategy` the process applies retention after each save that asks for it. `nearby`: where what is written is
    copied in this node's memory.
    """

    def __init__(
        self,
        store: CheckpointStore,
        strategy: CheckpointStrategy | None = None,
        options: WriterOptions | None = None,
        nearby: Nearby | None = None,
    ) -> None:
        self.options = options or WriterOptions()
        self._nearby = nearby
        self._store = store
        self._strategy = strategy
        self._stager = Stager()
        self._buffers: list[_Buffer] = []
        self._numbers = 0
        self._free = threading.Condition()
        self._process: WriterHandle | None = None
        self._starting = threading.Lock()
        self._courier = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-courier")
        self._preparing: threading.Thread | None = None

    # --- on the training thread -----------------------------------------------------------------------------

    def prepare(self, size: int) -> None:
        """Start the process and provide two buffers of `size` bytes, in the background: then no save pays for it."""
        if self._preparing is None and not self._buffers:
            self._preparing = threading.Thread(target=self._prepare, args=(size,), daemon=True)
            self._preparing.start()

    def has_room(self) -> bool:
        """Whether `stage` would not have to wait."""
        with self._free:
            return len(self._buffers) < self._most or any(buffer.free for buffer in self._buffers)

    def stage(self, description: Description) -> Staged:
        """Copy the state; waits while all buffers hold copies that are not written yet."""
        size = Stager.size_of(description)
        buffer = self._take(size)
        try:
            return Staged(self._stager.stage(description, buffer.arena.memory), buffer)
        except BaseException:
            self._give_back(buffer)
            raise

    def write(
        self,
        staged: Staged,
        folder: str,
        *,
        before_commit: Callable[[], object] | None = None,
        keep_house: bool = False,
    ) -> Future[Manifest]:
        """Write the copy into `folder` (relative to the store) while training goes on.

        `before_commit` is called meanwhile, on a thread; only when it has returned may the part count, and not at all
        if it raises. With `keep_house` retention follows. The future's errors: RayTrackingError of any kind.
        """
        return self._courier.submit(self._deliver, staged, folder, before_commit, keep_house)

    def close(self) -> None:
        """Wait until everything is written, then end the process. The buffers' memory is given back."""
        self._courier.shutdown(wait=True)
        if self._preparing is not None:
            self._preparing.join()
        if self._process is not None:
            self._process.close()
            self._process = None
        with self._free:
            for buffer in self._buffers:
                self._stager.forget(buffer.arena.memory)
                buffer.arena.close()
            self._buffers.clear()

    # --- buffers --------------------------------------------------------------------------------------------

    @property
    def _most(self) -> int:
        return _QUEUE if self.options.when_busy == "queue" else BUFFERS

    def _take(self, size: int) -> _Buffer:
        with self._free:
            while True:
                free = [buffer for buffer in self._buffers if buffer.free]
                fitting = [buffer for buffer in free if buffer.arena.size >= size]
                if fitting:
                    chosen = fitting[0]
                elif len(self._buffers) < self._most:
                    chosen = self._add(size)
                elif free:
                    self._remove(free[0])
                    chosen = self._add(size)
                else:
                    self._free.wait()
                    continue
                chosen.free = False
                return chosen

    def _add(self, size: int) -> _Buffer:
        try:
            arena = Arena(size)
        except OSError as error:
            raise CheckpointError(
                f"No shared memory for a copy of the state ({size / 2**20:.0f} MiB): {error}",
                hint="Free memory on this node, or save smaller parts with more workers.",
            ) from error
        self._numbers += 1
        buffer = _Buffer(self._numbers, arena)
        self._buffers.append(buffer)
        return buffer

    def _remove(self, buffer: _Buffer) -> None:
        self._buffers.remove(buffer)
        self._stager.forget(buffer.arena.memory)
        buffer.arena.close()
        if self._process is not None and buffer.sent_to == self._process.pid:
            self._process.tell({"do": "unmap", "number": buffer.number})

    def _give_back(self, buffer: _Buffer) -> None:
        with self._free:
            buffer.free = True
            self._free.notify_all()

    def _prepare(self, size: int) -> None:
        try:
            process = self._running()
            for _ in range(BUFFERS):
                with self._free:
                    if len(self._buffers) >= BUFFERS:
                        return
                    buffer = self._add(size)
                    mapped = self._send_buffer(process, buffer, fill=True)
                mapped.result()
                fault_in(buffer.arena.memory)  # the pages are there now: this only maps them here
        except (RayTrackingError, WriterEndedError) as error:
            log.debug("checkpoint buffers not prepared; the first saves take longer", error=str(error))

    # --- on the courier's thread ----------------------------------------------------------------------------

    def _deliver(
        self, staged: Staged, folder: str, before_commit: Callable[[], object] | None, keep_house: bool
    ) -> Manifest:
        try:
            self._stager.synchronize()
            keyring = self.options.keyring
            key = keyring.new_data_key() if keyring is not None and keyring.can_seal else None
            for last_try in (False, True):
                try:
                    return self._write_once(staged, folder, key, before_commit, keep_house)
                except WriterEndedError as error:
                    if last_try:
                        raise CheckpointError(f"The checkpoint writer ended twice: {error}") from error
                    log.warning("the checkpoint writer ended; starting it again", reason=str(error))
            raise AssertionError("unreachable")
        finally:
            self._give_back(staged.buffer)

    def _write_once(
        self,
        staged: Staged,
        folder: str,
        key: DataKey | None,
        before_commit: Callable[[], object] | None,
        keep_house: bool,
    ) -> Manifest:
        process = self._running()
        buffer = staged.buffer
        if buffer.sent_to != process.pid:
            self._send_buffer(process, buffer, fill=False)
        begin = {name: _offset_in(buffer.arena.memory, view) for name, view in staged.snapshot.files.items()}
        number, answer = process.ask(
            {
                "do": "write",
                "folder": folder,
                "manifest": names.encode_manifest(staged.snapshot.manifest).decode("ascii"),
                "files": {
                    name: [buffer.number, begin[name], len(view)] for name, view in staged.snapshot.files.items()
                },
                "compression": self.options.compression,
                "key": encode_key(key),
                "keep_house": keep_house,
            }
        )
        try:
            if before_commit is not None:
                before_commit()
        except BaseException:
            process.tell({"do": "cancel", "number": number})
            answer.exception()  # the buffer is its until it has let go
            raise
        process.tell({"do": "commit", "number": number})
        return names.decode_manifest(answer.result()["manifest"].encode("ascii"))

    def _send_buffer(self, process: WriterHandle, buffer: _Buffer, *, fill: bool) -> Future[Any]:
        buffer.sent_to = process.pid
        return process.map(buffer.number, buffer.arena, fill=fill)

    def _running(self) -> WriterHandle:
        with self._starting:
            if self._process is None or self._process.has_ended:
                self._process = WriterHandle(
                    {
                        "uri": self._store.storage.uri,
                        "folder": self._store.folder,
                        "strategy": None if self._strategy is None else asdict(self._strategy),
                        "nearby": None if self._nearby is None else self._nearby.setup(),
                        "niceness": self.options.niceness,
                        "deadline": self.options.deadline,
                        "log": child_settings(),
                    }
                )
            return self._process


def _offset_in(memory: memoryview, view: memoryview) -> int:
    return address_of(view) - address_of(memory)
