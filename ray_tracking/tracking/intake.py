"""Batches of many senders into the journal: together where they come together, each log call once.

In: packed batches of (attempt, rank). Out: durable rows, told to `written` in journal order, and acknowledgements.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from ray_tracking.errors import JournalError
from ray_tracking.journal.writer import JournalWriter
from ray_tracking.log import get_logger
from ray_tracking.records import Record, records_of
from ray_tracking.tracking.transport import unpack

log = get_logger()


@dataclass(slots=True)
class _Ticket:
    """One batch waiting for the next commit."""

    rank: int
    attempt: int
    records: list[Record]
    done: bool = False
    error: Exception | None = None


class _Unfit(Exception):
    """Something among the records can't be journaled."""


class Intake:
    """Thread-safe. `written` is called with the rows of each commit; what it returns is journaled after them."""

    def __init__(self, writer: JournalWriter, written: Callable[[list[Record]], list[Record]]) -> None:
        self.refused = 0
        """Records that the journal could not hold: dropped, counted and said."""
        self._writer = writer
        self._written = written
        self._seqs: dict[tuple[int, int], int] = {}
        self._waiting: list[_Ticket] = []
        self._lock = threading.Lock()
        self._committing = threading.Lock()

    def append(self, rank: int, attempt: int, batch: bytes) -> int:
        """Journal a packed batch of (attempt, rank); returns the sender's highest durable seq.

        Batches that arrive while one is being committed go together into the next commit. Raises StorageError.
        """
        events = unpack(batch)
        records = [record for event in events for record in records_of(event, rank=rank, attempt=attempt)]
        ticket = _Ticket(rank, attempt, records)
        with self._lock:
            self._waiting.append(ticket)
        with self._committing:
            if not ticket.done:
                with self._lock:
                    tickets, self._waiting = self._waiting, []
                self._commit_all(tickets)
            if ticket.error is not None:
                raise ticket.error
            return self._last_seq(attempt, rank)

    def add(self, records: list[Record]) -> None:
        """Journal rows of the tracker itself. Raises StorageError."""
        with self._committing:
            self._write(records)

    def _commit_all(self, tickets: list[_Ticket]) -> None:
        """One commit for all; one by one if there is something among them that the journal can't hold."""
        try:
            self._write([record for ticket in tickets for record in self._without_doubles(ticket)])
        except _Unfit as error:
            if len(tickets) == 1:
                self._refuse(tickets[0], error)
            else:
                for ticket in tickets:
                    self._commit_all([ticket])
        except Exception as error:  # noqa: BLE001 - those who wait for the commit must hear of it, each on its thread
            for ticket in tickets:
                ticket.error = error
        for ticket in tickets:
            ticket.done = True

    def _write(self, records: list[Record]) -> None:
        while records:
            try:
                durable = self._writer.append(records)
            except JournalError as error:
                raise _Unfit(str(error)) from error
            # Not `records`: after a failure the writer also writes what it kept of other senders.
            for attempt, rank, seq in {(record.attempt, record.rank, record.seq) for record in durable}:
                self._seqs[attempt, rank] = max(self._last_seq(attempt, rank), seq)
            records = self._written(durable) if durable else []

    def _refuse(self, ticket: _Ticket, error: _Unfit) -> None:
        """A batch that can never be journaled would hold up all that come after it."""
        sender = (ticket.attempt, ticket.rank)
        self.refused += len(ticket.records)
        log.error(
            "records dropped: the journal can't hold them",
            error=str(error),
            records=len(ticket.records),
            rank=ticket.rank,
            dropped_so_far=self.refused,
        )
        self._seqs[sender] = max([self._last_seq(*sender), *(record.seq for record in ticket.records)])

    def _without_doubles(self, ticket: _Ticket) -> list[Record]:
        """A sender repeats what was not acknowledged: rows up to its last durable seq are there already."""
        last = self._last_seq(ticket.attempt, ticket.rank)
        return [record for record in ticket.records if record.seq > last]

    def _last_seq(self, attempt: int, rank: int) -> int:
        sender = (attempt, rank)
        if sender not in self._seqs:
            self._seqs[sender] = self._writer.last_seq(attempt, rank)
        return self._seqs[sender]
