"""Writing the journal: each append is one new file, durable before it is acknowledged.

In: batches of records. Out: the same records with their offsets, once they are on storage.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from ray_tracking.errors import JournalError
from ray_tracking.journal import files
from ray_tracking.journal.reader import JournalReader
from ray_tracking.journal.schema import number, table_of
from ray_tracking.journal.segments import NO_TERM, Segment, Term
from ray_tracking.journal.upkeep import Upkeep
from ray_tracking.records import Record
from ray_tracking.storage import Storage

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Batch:
    """What one append gathered: kept, byte for byte, until an append returned with it."""

    records: list[Record]
    segment: Segment
    data: memoryview
    durable: bool = False


class JournalWriter:
    """The one writer of a run's journal; `storage` is the run's directory. Thread-safe.

    An `append` that raised may have reached storage all the same (its reply was lost). So its batch is kept
    and written again, to the same name with the same bytes, before anything else: the caller appends the same
    records again, or goes on with others; nothing is doubled, torn or out of order.
    All records of one log call (`attempt`, `rank`, `seq`) belong into one append.

    `check` raises if this process must not write the journal any more (`Lease.check`); it is asked before and after
    each write, so an append returns only while no other writer had begun. `term` tells this writer's segments from
    those of the ones before it.
    """

    def __init__(
        self, storage: Storage, attempt: int, *, term: Term = NO_TERM, check: Callable[[], object] = lambda: None
    ) -> None:
        self._storage = storage
        self._term = term
        self._check = check
        self._lock = threading.Lock()
        self._upkeep_lock = threading.Lock()
        self._upkeep = Upkeep(storage, check)
        self._untold: list[_Batch] = []
        self._newest_seq: dict[tuple[int, int], int] = {}
        found = files.find(storage)
        self._newest = max(_attempts(storage, found.live), default=0)
        self._scanned_from = self._newest + 1
        self._next = self._allocated = found.next_offset
        self.begin_attempt(attempt)

    @property
    def next_offset(self) -> int:
        """The offset of the first record that is not acknowledged: readers may read up to it."""
        return self._next

    def begin_attempt(self, attempt: int) -> None:
        """From now on write into this attempt's folder. Attempts only rise."""
        if attempt < max(1, self._newest):
            raise JournalError(
                f"The journal of {self._storage.uri!r} is at attempt {self._newest}, past {attempt}.",
                hint="Attempts are numbered from 1, and each start of a run takes the next number.",
            )
        self.attempt = self._newest = attempt

    def append(self, records: Sequence[Record]) -> list[Record]:
        """Write records; when it returns they are durable. Returns them with their offsets, in journal order.

        After an append that raised, the next one also writes and returns that one's records, first;
        those passed in again are recognised by (`attempt`, `rank`, `seq`) and not doubled.
        Raises JournalError for a record that can't be stored (nothing is kept), StorageError as storage does.
        """
        with self._lock:
            fresh = self._without_untold(records)
            if fresh:
                numbered = number(fresh, self._allocated)
                table = table_of(numbered)
                if pc.max(table.column("attempt")).as_py() > self.attempt:
                    raise JournalError(
                        f"Records of a later attempt than {self.attempt} can't be journaled yet.",
                        hint="Call begin_attempt first.",
                    )
                segment, data = files.pack(table, self.attempt, self._term)
                self._untold.append(_Batch(numbered, segment, data))
                self._allocated += len(numbered)
            self._write_untold()
            self._check()  # only now is it known that the writes came in time
            told = [record for batch in self._untold for record in batch.records]
            self._untold.clear()
            self._next = self._allocated
            return told

    def last_seq(self, attempt: int, rank: int) -> int:
        """The highest `seq` journaled of that sender, 0 if none: what it resends up to there is a double."""
        with self._lock:
            if attempt < self._scanned_from:
                self._scan_sequences(attempt)
            return self._newest_seq.get((attempt, rank), 0)

    def merge(self) -> int:
        """One round of tiered merging; returns how many segments it removed, 0 when nothing is to do."""
        with self._upkeep_lock:
            return self._upkeep.merge(self._next)

    def compact(self) -> None:
        """Move everything into the Parquet history. The journal can be read meanwhile and appended to."""
        with self._upkeep_lock:
            with self._lock:
                self._write_untold()
            self._upkeep.compact(self._allocated)
            with self._lock:
                self._upkeep.remove_empty_folders()

    def _without_untold(self, records: Sequence[Record]) -> Sequence[Record]:
        if not self._untold:
            return records
        known = {_identity(record) for batch in self._untold for record in batch.records}
        return [record for record in records if _identity(record) not in known]

    def _write_untold(self) -> None:
        for batch in self._untold:
            if not batch.durable:
                self._check()
                self._storage.write_bytes(batch.segment.name, batch.data)
                batch.durable = True
                for attempt, rank, seq in {(one.attempt, one.rank, one.seq) for one in batch.records}:
                    self._saw(attempt, rank, seq)

    def _saw(self, attempt: int, rank: int, seq: int) -> None:
        self._newest_seq[attempt, rank] = max(self._newest_seq.get((attempt, rank), 0), seq)

    def _scan_sequences(self, attempt: int) -> None:
        """An attempt's records lie in its own folder or, late ones, in a later one's; or in the history."""
        live = files.find(self._storage).live
        newest = _attempts(self._storage, live)
        starts = [one.first for one, its in zip(live, newest, strict=True) if its >= attempt]
        if starts:
            # What is damaged can't be read by anyone: if it is sent again, it is no double.
            reader = JournalReader(self._storage, strict=False)
            for table in reader.tables(min(starts), ("attempt", "rank", "seq")):
                totals: Any = table.group_by(["attempt", "rank"]).aggregate([("seq", "max")])
                for row in totals.to_pylist():
                    self._saw(row["attempt"], row["rank"], row["seq_max"])
        self._scanned_from = attempt


def _attempts(storage: Storage, live: Sequence[Segment]) -> list[int]:
    """The newest attempt that each segment may hold records of."""
    return [_history_attempt(storage, one) if one.attempt is None else one.attempt for one in live]


def _history_attempt(storage: Storage, segment: Segment) -> int:
    try:
        return files.newest_attempt(storage, segment)
    except JournalError as error:  # readers will name it; a run can be resumed all the same
        _log.warning("journal history not readable: %s", error.message)
        return 0


def _identity(record: Record) -> tuple[object, ...]:
    if record.seq:
        return record.attempt, record.rank, record.seq
    return record.attempt, record.rank, record.kind, record.key, record.step, record.time
