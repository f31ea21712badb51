"""The lease files of a run as one process sees them: listed, read, and watched from one look to the next.

In: a run's directory. Out: what `lease_rules` judges by. Also the clearing away of what can never count again.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator, Mapping

from ray_tracking.errors import StorageError
from ray_tracking.log import get_logger
from ray_tracking.runs.lease_rules import FOLDER, Seat, Seen, parse_record
from ray_tracking.runs.process import Process, is_certainly_dead
from ray_tracking.storage import Entry, Storage

log = get_logger()

_PROBE = "probe-"
_LOOKS = 20
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Clock:
    """Durations. It goes on while the machine sleeps, which time.monotonic() does not."""

    def now(self) -> float:
        return time.clock_gettime(_CLOCK)

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)


class Onlooker:
    """Looks again and again, and remembers since when each file has been what it is."""

    def __init__(self, run: Storage, clock: Clock, process: Process) -> None:
        self.run = run
        self.clock = clock
        self.process = process
        self._known: dict[Seat, tuple[bytes, float, bool]] = {}

    def look(self) -> Mapping[Seat, Seen]:
        """All lease files as they are now."""
        for _ in range(_LOOKS):
            if next(seats(self.run), None) is None:
                return {}
            with contextlib.suppress(FileNotFoundError):  # cleared away by a new owner meanwhile
                entries, now = self._list()
                return {seat: self._see(seat, now - entry.modified) for seat, entry in entries.items()}
        raise StorageError(
            f"The lease files in {self.run.path(FOLDER)!r} can't be read: they change all the time.",
            hint="Many processes start this run again and again. Stop all but one.",
        )

    def _list(self) -> tuple[dict[Seat, Entry], float]:
        """The entries, and the storage's own time. Writing first also makes NFS forget an older listing."""
        probe = f"{_PROBE}{secrets.token_hex(8)}"
        self.run.write_bytes(f"{FOLDER}/{probe}", b"")
        entries = self.run.list(FOLDER)
        self.run.delete(f"{FOLDER}/{probe}")
        now = next((entry.modified for entry in entries if entry.name == probe), None)
        if now is None:
            raise FileNotFoundError(probe)
        return {seat: entry for entry in entries if (seat := Seat.parse(entry.name)) is not None}, now

    def _see(self, seat: Seat, age: float) -> Seen:
        data = self.run.read_bytes(seat.name)
        now = self.clock.now()
        before, since, moved = self._known.get(seat, (data, now, False))
        if before != data:
            since, moved = now, True
        self._known[seat] = data, since, moved
        record = parse_record(data)
        dead = record is not None and is_certainly_dead(record.process, self.process)
        return Seen(record, age, now - since, moved, dead)


def seats(run: Storage) -> Iterator[Seat]:
    """The seats that have a file."""
    return (seat for entry in run.list(FOLDER) if (seat := Seat.parse(entry.name)) is not None)


def process_at(run: Storage, seat: Seat) -> Process | None:
    """Whose lease it is; None if it can't be read."""
    with contextlib.suppress(FileNotFoundError, StorageError):
        record = parse_record(run.read_bytes(seat.name))
        return record.process if record else None
    return None


def clear_before(run: Storage, seat: Seat) -> None:
    """Remove what comes before `seat`. Whoever is cut off in here leaves the rest to the next one."""
    try:
        for entry in run.list(FOLDER):
            other = Seat.parse(entry.name)
            if entry.name.startswith(_PROBE) or (other is not None and seat.follows(other)):
                run.delete(f"{FOLDER}/{entry.name}")
    except StorageError as error:
        log.debug("old lease files were left", error=str(error))
