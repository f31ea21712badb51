"""The tracker of one run: journals what senders bring, keeps the run's record, fills the backends.

In: batches and questions through a Transport. Out: a durable journal, `run.json`, `summary.json`, filled backends.
Runs in the tracker actor or in a child process; every method may be called from several threads at once.
It writes only while it holds the run's lease: once another process has taken over, calls raise LeaseLostError.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from ray_tracking.config import ExperimentTrackingConfig, section
from ray_tracking.errors import LeaseLostError, RayTrackingError, StorageError
from ray_tracking.journal.reader import JournalReader
from ray_tracking.journal.writer import JournalWriter
from ray_tracking.log import bind, get_logger
from ray_tracking.records import Kind, Record
from ray_tracking.runs import stopping
from ray_tracking.runs.record import RunRecord, Status
from ray_tracking.runs.store import RunStore
from ray_tracking.runs.summary import Summary
from ray_tracking.storage import Storage
from ray_tracking.tracking.backends.base import Backend, RunInfo
from ray_tracking.tracking.collector import settle
from ray_tracking.tracking.cursor import BackendState, Cursor
from ray_tracking.tracking.delivery import Delivery
from ray_tracking.tracking.factory import create_backends
from ray_tracking.tracking.hangs import Report, Roll, Verdict
from ray_tracking.tracking.hold import Hold
from ray_tracking.tracking.intake import Intake
from ray_tracking.tracking.recording import RecordKeeper
from ray_tracking.tracking.reduce import RankReducer, unreduced
from ray_tracking.tracking.spec import TrackerSpec
from ray_tracking.tracking.tail import Tail

log = get_logger()

_HUNG_SECONDS = 60.0
"""Within which a failure of the workers is put down to a rank that was found to hang."""

_SUMMARY_SECONDS = 5.0
_KEEPER_SECONDS = 10.0


class TrackerService:
    """See the module. Raises RefusedError if the run is completed, LeaseHeldError or LeaseLostError if another process
    writes it, StorageError if the storage does not take it.
    """

    def __init__(
        self,
        spec: TrackerSpec,
        *,
        alone: bool = True,
        idle: bool = False,
        may_open: Callable[[], bool] = lambda: True,
        workers: int | None = None,
    ) -> None:
        """`alone`: in its process, so that all that is logged there is of this run.

        `idle`: the backends are filled when the processor has nothing better to do (`priority.wait_for_idle`).
        `may_open`: see Delivery. `workers`: of the attempt that will begin first, if that is known: see RecordKeeper.
        """
        self.spec = spec
        self._alone = alone
        self._idle = idle
        self._may_open = may_open
        if alone:
            bind(run=spec.run_id)
        root = Storage.open(spec.storage)
        self._runs = RunStore(root)
        self._directory = self._runs.directory(spec.run_id)
        self._hold = Hold(self._directory, spec)
        try:
            self._start(root, workers)
        except BaseException:
            self._hold.release()
            raise

    def _start(self, root: Storage, workers: int | None) -> None:
        self._records = RecordKeeper(self._runs, self.spec, self._hold, workers)
        attempts = self._records.record.attempts
        attempt = attempts[-1].number if attempts else 1
        self._writer = JournalWriter(self._directory, attempt, term=self._hold.term, check=self._hold.check)
        self._summary = Summary.load(self._directory)
        self._catch_up_summary()
        self._summarising = threading.Lock()
        self._tail = Tail(self._writer.next_offset)
        self._intake = Intake(self._writer, self._written)
        self._reducer, whole = self._gather_ranks()
        self._left_over: list[RankReducer] = []
        """Of attempts before this one, until it says what it resumed from."""
        self._intake.add(whole)
        self._closing = threading.Event()
        self._close_lock = threading.Lock()
        self._closed = False
        self._progress: dict[str, Any] = {}
        self._stop_requested = False
        self._hopeless: str | None = None
        self._roll = Roll()
        self._hung = "", 0.0
        self._tracking = section(ExperimentTrackingConfig, self.spec.tracking)
        self._deliveries, self._unavailable = self._start_deliveries(root)
        self._keeper = threading.Thread(target=self._keep, name="ray-tracking-keeper", daemon=True)
        self._keeper.start()
        settle()

    # --- attempts -------------------------------------------------------------------------------------------

    def give_up(self, message: str) -> None:
        """Why the workers are not started again."""
        self._hopeless = message

    def warn(self, message: str) -> None:
        """A line in the run's log, from a process whose own log nobody sees."""
        log.warning(message)

    def hear_rank(self, group: str, rank: int, world_size: int, report: Report, limit: float) -> Verdict | None:
        """What a rank says of its training thread; what is to be done about ranks that hang, by their own `limit`."""
        now = time.monotonic()
        verdict = self._roll.hear(group, rank, world_size, report, limit, now)
        if verdict is not None and rank in verdict.actors:  # only these end the group
            self._hung = verdict.text, now
        return verdict

    def hopeless(self) -> str | None:
        """The message of `give_up`, None if nobody has. Raises LeaseLostError if another process writes the run."""
        self._refuse_if_lost()
        return self._hopeless

    def begin_attempt(self, world_size: int) -> int:
        """A worker group has started: its attempt number."""
        number = self._records.begin_attempt(world_size)
        self._hung = "", 0.0
        self._left_over.append(self._reducer)
        self._reducer = RankReducer(number, world_size)
        self._writer.begin_attempt(number)
        if self._alone:
            bind(attempt=number)
        if number > 1:
            log.info("a new attempt begins", workers=world_size)
        return number

    def end_attempt(self, reason: str) -> None:
        """The workers have failed, for this reason; whether they are started again is not known yet.

        A rank that hangs and can't end by itself is killed, and its death may be heard of first: the cause is the hang.
        """
        hung, when = self._hung
        self._hung = "", 0.0
        if hung and time.monotonic() - when < _HUNG_SECONDS:
            log.info("put down to the rank that hung", heard=reason)
            reason = hung
        log.warning("the workers failed", reason=reason)
        self.close_attempt(reason)

    def close_attempt(self, reason: str) -> None:
        """The record of the open attempt, if there is one, ends with this reason, which need not be a failure."""
        self._records.change(lambda record: record.end_attempt(time.time(), reason))

    # --- records --------------------------------------------------------------------------------------------

    def append(self, rank: int, attempt: int, batch: bytes) -> int:
        """Journal a packed batch of (attempt, rank); returns the sender's highest durable seq. Raises StorageError."""
        return self._intake.append(rank, attempt, batch)

    def _written(self, rows: list[Record]) -> list[Record]:
        """Rows that are durable now, in journal order. Returns what is to be journaled because of them."""
        begun = [row for row in rows if row.kind is Kind.ATTEMPT]
        self._note_resumes(begun)
        self._summarise(rows, begun)
        self._tail.add(rows)
        return self._left_by_the_dead(begun) + self._reducer.add(rows)

    def _left_by_the_dead(self, begun: list[Record]) -> list[Record]:
        """The points of the attempt before that lack a rank which sends no more, as far as they count.

        Those past the step resumed from are logged again, by all ranks: a backend that can't forget must not be shown
        the numbers of a part of the ranks first.
        """
        if not begun:
            return []
        left, self._left_over = self._left_over, []
        return [row for reducer in left for row in reducer.drain() if row.step <= begun[-1].step]

    def _summarise(self, rows: list[Record], begun: list[Record]) -> None:
        reached = self._summary.last_step
        with self._summarising:
            self._summary.add(rows)
        if any(row.step < reached for row in begun):
            # What earlier attempts logged past that step counts no more: neither as last nor as best.
            effective = self._reader().effective()
            with self._summarising:
                self._summary.replace_metrics(effective)

    def _note_resumes(self, begun: list[Record]) -> None:
        for record in begun:
            self._records.change(partial(RunRecord.resumed, number=record.attempt, step=record.step))

    # --- what others ask ------------------------------------------------------------------------------------

    def confirm(self) -> None:
        """Raises LeaseLostError if another process writes the run: then nothing of this one may count any more."""
        self._hold.check()

    def _refuse_if_lost(self) -> None:
        if self._hold.lost is not None:
            raise self._hold.lost

    def report_progress(self, progress: dict[str, Any]) -> bool:
        """What rank 0 says of its position, for `status`. Answers whether training should end early."""
        self._refuse_if_lost()
        self._progress = progress
        return self._stop_requested

    def request_stop(self) -> None:
        """Ask training to end at its next `should_stop()`."""
        self._stop_requested = True

    def status(self) -> dict[str, Any]:
        """Step, progress and how each backend stands, for the progress line."""
        with self._summarising:
            metrics = {key: metric.last for key, metric in self._summary.metrics.items()}
        return {
            "run_id": self.spec.run_id,
            "last_step": self._summary.last_step,
            "next_offset": self._tail.next_offset,
            "progress": self._progress,
            "metrics": metrics,
            "backends": {cursor.backend: cursor.state.value for cursor in self._cursors()},
        }

    def last_step(self) -> int:
        """The step reached, 0 before the first."""
        return self._summary.last_step

    def has_history(self) -> bool:
        """Whether anything was journaled yet."""
        return self._tail.next_offset > 0

    def wait_delivered(self, timeout: float) -> bool:
        """Wait until every backend has what is in the journal now. False if the time ran out."""
        target, end = self._tail.next_offset, time.monotonic() + timeout
        for delivery in self._deliveries:
            delivery.hurry()
        while any(delivery.cursor.offset < target for delivery in self._deliveries):
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True

    def close(self, status: str, reason: str) -> dict[str, Any]:
        """End the run: deliver for at most `final_secs`, compact the journal, write the record.

        Returns `{backends: {name: {state, delivered, pending, error}}, next_offset}`. Calling it again changes nothing.
        Raises StorageError if run.json can't be written: it may be called again then. LeaseLostError if another
        process writes the run: it is not touched then.
        """
        with self._close_lock:
            if not self._closed:
                self._end_run(Status(status), reason)
                self._closed = True
                self._hold.release()
        return self._report()

    def _end_run(self, status: Status, reason: str) -> None:
        self._hold.check()
        end = time.monotonic() + self._tracking.delivery.final_secs
        self._closing.set()
        try:
            self._intake.add(self._reducer.drain())
        except StorageError as error:
            log.warning("the ranks' last metrics could not be reduced; the journal has them", error=str(error))
        for delivery in self._deliveries:
            delivery.finish(status.value, end)
        for delivery in self._deliveries:
            delivery.join(end + 1.0 - time.monotonic())
        self._keeper.join(_KEEPER_SECONDS)  # on a storage that hangs it may never come back
        try:
            self._writer.compact()
            self._save_summary()
        except LeaseLostError:
            raise
        except RayTrackingError as error:
            log.warning("the journal could not be compacted; nothing of it is lost", error=str(error))
        self._records.commit(lambda record: record.finish(time.time(), status, reason))

    def _report(self) -> dict[str, Any]:
        with self._summarising:
            record = self._records.record
            metrics = self._summary.best(record.monitor, record.mode)
        return {
            "next_offset": self._tail.next_offset,
            "metrics": metrics,
            "last_step": self._summary.last_step,
            "attempts": len(self._records.record.attempts),
            "refused": self._intake.refused,
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

    def _reader(self) -> JournalReader:
        """Of what this writer and those before it journaled. A damaged segment must not keep a run from going on."""
        return JournalReader(self._directory, strict=False, end=lambda: self._writer.next_offset)

    def _catch_up_summary(self) -> None:
        """Take in rows that were journaled after the summary was last saved (a killed tracker)."""
        reader = self._reader()
        while rows := reader.read(self._summary.offset, 50_000):
            self._summary.add(rows)

    def _gather_ranks(self) -> tuple[RankReducer, list[Record]]:
        """The ranks' metrics that wait for other ranks', found again in the journal after a restart.

        Also the reduced rows that a tracker was killed before it could journal.
        """
        attempts = self._records.record.attempts
        if not attempts:
            return RankReducer(1, 1), []
        newest = attempts[-1]
        reducer = RankReducer(newest.number, newest.world_size)
        reader = self._reader()
        return reducer, reducer.add(unreduced(reader, newest.number) if self._writer.next_offset else [])

    def _start_deliveries(self, root: Storage) -> tuple[list[Delivery], list[Cursor]]:
        info = RunInfo(
            self.spec.run_id,
            self.spec.name,
            self.spec.config,
            self.spec.tags,
            self.spec.local_dir,
            self._directory.child("artifacts").uri,
            self._records.record.created,
        )
        deliveries, unavailable = [], []
        for backend in create_backends(self._tracking) if self._tracking.enabled else []:
            if isinstance(backend, Backend):
                delivery = Delivery(
                    backend,
                    info,
                    self._directory,
                    self._tail,
                    deadline=self._tracking.delivery.deadline_secs,
                    idle=self._idle,
                    check=self._hold.check,
                    may_open=self._may_open,
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
                self._hold.check()
                cursor.save(self._directory)
                unavailable.append(cursor)
        return deliveries, unavailable

    def _keep(self) -> None:
        """Every few seconds: the summary (which is also the sign of life), and merging of small segments.

        Between them it looks whether the run is asked to end early.
        """
        failed = False
        look = min(stopping.poll_seconds(self._directory), _SUMMARY_SECONDS)
        due = time.monotonic() + _SUMMARY_SECONDS
        while not self._closing.wait(look):
            try:
                if not self._stop_requested and (asked := stopping.requested(self._directory)):
                    log.info("asked to stop", by=asked.by)
                    self.request_stop()
                if time.monotonic() < due:
                    continue
                due = time.monotonic() + _SUMMARY_SECONDS
                self._save_summary()
                self._records.repair()
                for delivery in self._deliveries:
                    delivery.save_if_hanging()
                self._writer.merge()
                failed = False
            except LeaseLostError:
                return  # said by the hold
            except Exception as error:  # noqa: BLE001 - without its sign of life the run would pass for dead
                if not failed:
                    log.warning("the run's upkeep failed; trying again", error=f"{type(error).__name__}: {error}")
                failed = True

    def _save_summary(self) -> None:
        self._hold.check()
        with self._summarising:
            self._summary.updated = time.time()
            document = self._summary.encode()
        Summary.write(self._directory, document)
