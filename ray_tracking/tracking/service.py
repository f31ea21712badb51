"""The tracker of one run: journals what senders bring, keeps the run's record, fills the backends.

In: batches and questions through a Transport. Out: a durable journal, `run.json`, `summary.json`, filled backends.
Runs in the tracker actor or in a child process; every method may be called from several threads at once.
"""

from __future__ import annotations

import importlib.metadata
import platform
import threading
import time
from dataclasses import dataclass, field, replace
from typing import Any

from ray_tracking.config import ExperimentTrackingConfig, section
from ray_tracking.errors import RefusedError, StorageError
from ray_tracking.journal.reader import JournalReader
from ray_tracking.journal.writer import JournalWriter
from ray_tracking.log import bind, get_logger
from ray_tracking.records import Kind, Record, records_of
from ray_tracking.runs.record import RunRecord, Status
from ray_tracking.runs.store import RunStore
from ray_tracking.runs.summary import Summary
from ray_tracking.storage import Storage
from ray_tracking.tracking.backends.base import Backend, RunInfo
from ray_tracking.tracking.cursor import BackendState, Cursor
from ray_tracking.tracking.delivery import Delivery
from ray_tracking.tracking.factory import create_backends
from ray_tracking.tracking.spec import TrackerSpec
from ray_tracking.tracking.tail import Tail
from ray_tracking.tracking.transport import unpack

log = get_logger()

_SUMMARY_SECONDS = 5.0
_VERSIONS_OF = ("ray-tracking", "ray", "torch", "numpy", "pyarrow", "tensorboard", "wandb", "mlflow")


@dataclass(slots=True)
class _Ticket:
    """One batch waiting for the next commit."""

    rank: int
    attempt: int
    records: list[Record]
    done: bool = False
    error: StorageError | None = None


@dataclass(slots=True)
class _Pending:
    lock: threading.Lock = field(default_factory=threading.Lock)
    tickets: list[_Ticket] = field(default_factory=list)


class TrackerService:
    """See the module. Raises RefusedError if the run has ended and `reopen` is not set."""

    def __init__(self, spec: TrackerSpec) -> None:
        self.spec = spec
        bind(run=spec.run_id)
        root = Storage.open(spec.storage)
        self._runs = RunStore(root)
        self._directory = self._runs.directory(spec.run_id)
        self._record = self._load_or_create()
        attempt = self._record.attempts[-1].number if self._record.attempts else 1
        self._writer = JournalWriter(self._directory, attempt)
        self._summary = Summary.load(self._directory)
        self._catch_up_summary()
        self._seqs: dict[tuple[int, int], int] = {}
        self._pending = _Pending()
        self._committing = threading.Lock()
        self._recording = threading.Lock()
        self._tail = Tail(JournalReader(self._directory), self._writer.next_offset)
        self._closing = threading.Event()
        self._progress: dict[str, Any] = {}
        self._stop_requested = False
        self._tracking = section(ExperimentTrackingConfig, spec.tracking)
        self._deliveries, self._unavailable = self._start_deliveries(root)
        self._keeper = threading.Thread(target=self._keep, name="ray-tracking-keeper", daemon=True)
        self._keeper.start()

    # --- attempts -------------------------------------------------------------------------------------------

    def begin_attempt(self, world_size: int) -> int:
        """A worker group has started: its attempt number."""
        with self._recording:
            self._record = self._record.begin_attempt(time.time(), world_size)
            self._runs.save(self._record)
            number = self._record.attempts[-1].number
        self._writer.begin_attempt(number)
        bind(attempt=number)
        if number > 1:
            log.info("a new attempt begins", workers=world_size)
        return number

    def end_attempt(self, reason: str) -> None:
        """The workers have failed, for this reason; whether they are started again is not known yet."""
        log.warning("the workers failed", reason=reason)
        with self._recording:
            self._record = self._record.end_attempt(time.time(), reason)
            self._runs.save(self._record)

    # --- records --------------------------------------------------------------------------------------------

    def append(self, rank: int, attempt: int, batch: bytes) -> int:
        """Journal a packed batch of (attempt, rank); returns the sender's highest durable seq.

        Batches that arrive while one is being committed go together into the next commit.
        """
        events = unpack(batch)
        records = [record for event in events for record in records_of(event, rank=rank, attempt=attempt)]
        ticket = _Ticket(rank, attempt, records)
        with self._pending.lock:
            self._pending.tickets.append(ticket)
        with self._committing:
            if not ticket.done:
                with self._pending.lock:
                    tickets, self._pending.tickets = self._pending.tickets, []
                self._commit(tickets)
        if ticket.error is not None:
            raise ticket.error
        return self._last_seq(attempt, rank)

    def _commit(self, tickets: list[_Ticket]) -> None:
        fresh = [record for ticket in tickets for record in self._without_doubles(ticket)]
        try:
            written = self._writer.append(fresh) if fresh else []
        except StorageError as error:
            for ticket in tickets:
                ticket.done, ticket.error = True, error
            return
        for ticket in tickets:
            if ticket.records:
                sender = (ticket.attempt, ticket.rank)
                self._seqs[sender] = max(self._last_seq(*sender), ticket.records[-1].seq)
            ticket.done = True
        if written:
            self._tail.add(written)
            self._summary.add(written)
            self._note_resumes(written)

    def _without_doubles(self, ticket: _Ticket) -> list[Record]:
        """A sender repeats what was not acknowledged: rows up to its last durable seq are there already."""
        last = self._last_seq(ticket.attempt, ticket.rank)
        return [record for record in ticket.records if record.seq > last]

    def _last_seq(self, attempt: int, rank: int) -> int:
        sender = (attempt, rank)
        if sender not in self._seqs:
            self._seqs[sender] = self._writer.last_seq(attempt, rank)
        return self._seqs[sender]

    def _note_resumes(self, written: list[Record]) -> None:
        for record in written:
            if record.kind is Kind.ATTEMPT:
                with self._recording:
                    self._record = self._record.resumed(record.attempt, record.step)
                    self._runs.save(self._record)

    def _resumed_step(self, attempt: int) -> int:
        for known in self._record.attempts:
            if known.number == attempt and known.resumed_from_step is not None:
                return known.resumed_from_step
        return -1

    # --- what others ask ------------------------------------------------------------------------------------

    def report_progress(self, progress: dict[str, Any]) -> bool:
        """What rank 0 says of its position, for `status`. Answers whether training should end early."""
        self._progress = progress
        return self._stop_requested

    def request_stop(self) -> None:
        """Ask training to end at its next `should_stop()`."""
        self._stop_requested = True

    def status(self) -> dict[str, Any]:
        """Step, progress and how each backend stands, for the progress line."""
        return {
            "run_id": self.spec.run_id,
            "last_step": self._summary.last_step,
            "next_offset": self._tail.next_offset,
            "progress": self._progress,
            "metrics": {key: metric.last for key, metric in list(self._summary.metrics.items())},
            "backends": {cursor.backend: cursor.state.value for cursor in self._cursors()},
        }

    def last_step(self) -> int:
        """The greatest step of any metric so far, 0 if there is none."""
        return self._summary.last_step

    def has_history(self) -> bool:
        """Whether anything was journaled yet."""
        return self._tail.next_offset > 0

    def wait_delivered(self, timeout: float) -> bool:
        """Wait until every backend has what is in the journal now. False if the time ran out."""
        target, end = self._tail.next_offset, time.monotonic() + timeout
        while any(delivery.cursor.offset < target for delivery in self._deliveries):
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True

    def close(self, status: str, reason: str) -> dict[str, Any]:
        """End the run: deliver for at most `final_secs`, compact the journal, write the record.

        Returns `{backends: {name: {state, delivered, pending, error}}, next_offset}`. Calling it again changes nothing.
        """
        if not self._closing.is_set():
            self._closing.set()
            self._keeper.join()
            end = time.monotonic() + self._tracking.delivery.final_secs
            for delivery in self._deliveries:
                delivery.finish(status, end)
            for delivery in self._deliveries:
                delivery.join(end + 1.0 - time.monotonic())
            self._writer.compact()
            self._save_summary()
            with self._recording:
                self._record = self._record.finish(time.time(), Status(status), reason)
                self._runs.save(self._record)
        return {
            "next_offset": self._tail.next_offset,
            "metrics": self._summary.best(self._record.monitor, self._record.mode),
            "last_step": self._summary.last_step,
            "attempts": len(self._record.attempts),
            "backends": {
                cursor.backend: {
                    "state": cursor.state.value,
                    "delivered": cursor.delivered,
                    "pending": self._tail.next_offset - cursor.offset,
                    "location": cursor.location,
                    "error": cursor.error,
                }
                for cursor in self._cursors()
            },
        }

    # --- inside ---------------------------------------------------------------------------------------------

    def _cursors(self) -> list[Cursor]:
        return [delivery.state for delivery in self._deliveries] + self._unavailable

    def _load_or_create(self) -> RunRecord:
        if self._runs.exists(self.spec.run_id):
            record = self._runs.load(self.spec.run_id)
            if record.status is Status.COMPLETED:
                raise RefusedError(
                    f"The run {record.run_id!r} is completed; its history is not written on.",
                    hint="Choose another run id, or leave it out for a new one.",
                )
            return replace(record, status=Status.RUNNING)
        record = self.spec.new_record(time.time(), _versions())
        self._runs.save(record)
        return record

    def _catch_up_summary(self) -> None:
        """Take in rows that were journaled after the summary was last saved (a killed tracker)."""
        reader = JournalReader(self._directory)
        while rows := reader.read(self._summary.offset, 50_000):
            self._summary.add(rows)

    def _start_deliveries(self, root: Storage) -> tuple[list[Delivery], list[Cursor]]:
        info = RunInfo(
            self.spec.run_id,
            self.spec.name,
            self.spec.config,
            self.spec.tags,
            self.spec.local_dir,
            self._directory.child("artifacts").uri,
        )
        deliveries, unavailable = [], []
        for backend in create_backends(self._tracking) if self._tracking.enabled else []:
            if isinstance(backend, Backend):
                delivery = Delivery(
                    backend,
                    info,
                    self._directory,
                    self._tail,
                    self._resumed_step,
                    self._tracking.delivery.deadline_secs,
                )
                delivery.start()
                deliveries.append(delivery)
            else:
                log.warning("backend unavailable", backend=backend.name, reason=backend.reason, fix=backend.hint)
                cursor = replace(
                    Cursor.load(self._directory, backend.name),
                    state=BackendState.UNAVAILABLE,
                    error=f"{backend.reason} {backend.hint}",
                )
                cursor.save(self._directory)
                unavailable.append(cursor)
        return deliveries, unavailable

    def _keep(self) -> None:
        """Every few seconds: the summary (which is also the sign of life), and merging of small segments."""
        while not self._closing.wait(_SUMMARY_SECONDS):
            try:
                self._save_summary()
                self._writer.merge()
            except StorageError as error:
                log.warning("the storage does not take the summary; trying again", error=str(error))

    def _save_summary(self) -> None:
        self._summary.updated = time.time()
        self._summary.save(self._directory)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _VERSIONS_OF:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
