"""Who may write a run: one owner, and one writer that works for it; a second one is refused, a stale one shut out.

In: a run's directory. Out: a `Lease` to be asked before each write. `lease_rules` says who may take over, and when.

The driver calls `acquire` and keeps the lease with a `LeaseKeeper`; the tracker process gets its `ticket` and calls
`join`. A tracker that is started again joins again, and shuts out the one before it. No two machines' clocks are
compared: a lease has run out by the storage's clock, and is taken after a silence by the newcomer's.
What no lease can prevent is a write that was begun in time and lands late: of a process stopped between `check` and
its write. So a write counts, and may be acknowledged, only if a `check` after it passes too.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Self

from ray_tracking.conditional import is_exclusive
from ray_tracking.errors import LeaseHeldError, LeaseLostError, RayTrackingError, StorageError
from ray_tracking.log import get_logger
from ray_tracking.runs.lease_files import Clock, Onlooker, clear_before, process_at, seats
from ray_tracking.runs.lease_rules import (
    DEFAULT_SECONDS,
    FOLDER,
    LONGEST_SECONDS,
    RENEWAL,
    SILENCE,
    TRUST,
    LeaseRecord,
    Seat,
    Seen,
    Verdict,
    expires_in,
    judge,
    parse_record,
    silence_left,
)
from ray_tracking.runs.process import Process, is_certainly_dead, this_process
from ray_tracking.storage import Storage

log = get_logger()

_LOOK_SECONDS = 1.0
"""Between two looks at a writer that may have died: of a driver killed just now, it ends within a second or two."""


class Lease:
    """A lease that was taken by `acquire` or `join`. Thread-safe."""

    def __init__(self, run: Storage, seat: Seat, record: LeaseRecord, clock: Clock, taken: float) -> None:
        self.seat = seat
        self._run = run
        self._record = record
        self._clock = clock
        self._sure = taken
        """When, by our clock, it was written for the last time that nobody else was found after."""
        self._lock = threading.RLock()
        self._lost: LeaseLostError | None = None

    @property
    def epoch(self) -> int:
        """Grows by one with each owner that the run has had."""
        return self.seat.epoch

    @property
    def duration(self) -> float:
        """Seconds without a sign of life after which others may take over."""
        return self._record.duration

    @property
    def lost(self) -> LeaseLostError | None:
        """Why nothing may be written any more, as far as this process has noticed."""
        return self._lost

    @property
    def ticket(self) -> str:
        """What a process that is to write for this owner needs for `join`."""
        return json.dumps({"epoch": self.epoch, "token": self._record.token, "duration": self.duration})

    def check(self) -> None:
        """Return if this process may write the run now. Costs a look at the clock; more if renewals have been missed.

        Raises LeaseLostError if another one may, StorageError if the storage can't be asked.
        """
        if self._lost is None and self._is_sure():
            return
        with self._lock:
            if self._lost is not None or not self._is_sure():
                self.renew()

    def renew(self) -> None:
        """Tell others that this process lives, and look whether it is still its turn. Raises as `check`."""
        with self._lock:
            if self._lost is not None:
                raise self._lost
            begun = self._clock.now()
            self._check_own_file()
            self._record = replace(self._record, renewals=self._record.renewals + 1)
            # First written, then looked: whoever takes over does the same, so one of the two sees the other.
            self._run.write_bytes(self.seat.name, self._record.to_json())
            self.confirm()
            self._sure = begun

    def confirm(self) -> None:
        """Raises LeaseLostError if someone has taken over, as far as a listing shows."""
        newest = max((seat for seat in seats(self._run) if seat.shuts_out(self.seat)), default=None)
        if newest is None:
            return
        winner = Seat(newest.epoch) if newest.epoch > self.epoch else newest
        self._lost = _lost_to(self._run, self.seat, winner, process_at(self._run, winner))
        with contextlib.suppress(StorageError):
            self._run.delete(self.seat.name)  # `renew` may have written it after others had cleared it away
        raise self._lost

    def _check_own_file(self) -> None:
        """Where the storage does not decide who was first, another one may have made the same file."""
        try:
            found = parse_record(self._run.read_bytes(self.seat.name))
        except FileNotFoundError:
            return  # cleared away by who took over: `confirm` finds that one
        if found is not None and found.token != self._record.token:
            self._lost = _lost_to(self._run, self.seat, self.seat, found.process)
            raise self._lost

    def release(self) -> None:
        """Give it back: the next one need not wait. Nothing may be written after it. Does not raise for the storage."""
        with self._lock:
            if self._lost is not None:
                return
            self._lost = LeaseLostError(
                f"The lease of the run {_run_id(self._run)!r} (number {self.seat}) was given back; "
                "nothing more is written.",
                run=_run_id(self._run),
                epoch=self.epoch,
            )
            try:
                self._run.write_bytes(self.seat.name, replace(self._record, released=True).to_json())
            except StorageError as error:
                log.warning("the lease of the run was not given back; it runs out by itself", error=str(error))

    def _is_sure(self) -> bool:
        return self._clock.now() - self._sure <= TRUST * self.duration


class LeaseKeeper:
    """Renews a lease on a thread, and gives it back at the end of the `with` block.

    `lost` is called once, on that thread, when another process has taken over. A storage that fails is tried again.
    """

    def __init__(self, lease: Lease, lost: Callable[[LeaseLostError], object] = lambda error: None) -> None:
        self._lease = lease
        self._tell = lost
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="ray-tracking-lease", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(self._lease.duration)  # on a storage that hangs it may never come back
        if not self._thread.is_alive():
            self._lease.release()

    def _keep(self) -> None:
        failed = False
        while not self._over.wait(self._lease.duration * RENEWAL):
            try:
                self._lease.renew()
                failed = False
            except LeaseLostError as error:
                self._tell(error)
                return
            except Exception as error:  # noqa: BLE001 - without this thread a run that is well would pass for dead
                if not failed:
                    said = str(error) or type(error).__name__
                    log.warning("the lease of the run can't be renewed; trying again", error=said)
                failed = True


def acquire(
    run: Storage,
    *,
    duration: float = DEFAULT_SECONDS,
    patience: float = 0.0,
    clock: Clock | None = None,
    process: Process | None = None,
) -> Lease:
    """Become the owner of the run whose directory `run` is. Wait up to `patience` seconds for who holds it now.

    At once if there is no owner, it has given the lease back, or it is known to be dead (it ran on this host). One that
    has run out is watched for half of its duration first. Raises LeaseHeldError, StorageError.
    """
    if not 0 < duration <= LONGEST_SECONDS:
        raise ValueError(f"A lease lasts more than 0 and at most {LONGEST_SECONDS:.0f} seconds, not {duration}.")
    if not is_exclusive(run):
        log.warning(
            "this storage can't tell who was first: two drivers that start at the very same moment may both run",
            storage=run.filesystem.type_name,
            fix='for S3: pip install "ray-tracking[s3]"',
        )
    onlooker = Onlooker(run, clock or Clock(), process or this_process())
    until = onlooker.clock.now() + patience
    watching = False
    while True:
        seen = onlooker.look()
        epoch = max(seen, default=Seat(0)).epoch
        owner = seen.get(Seat(epoch))
        verdict = judge(owner)
        if owner is None or verdict is Verdict.FREE:
            lease = _claim(onlooker, Seat(epoch + 1), duration, seen)
            if lease is not None:
                return lease
            continue
        pause = owner.duration * SILENCE / 3
        if verdict is Verdict.DOUBTFUL:
            left = owner.duration * SILENCE - owner.watched
            if not watching:
                holder = str(owner.record.process) if owner.record else "not readable"
                log.info("the lease has run out; watching it for a sign of life", holder=holder, seconds=round(left, 1))
            watching = True
        else:
            left = until - onlooker.clock.now()
            if left <= 0:
                raise _held_by(run, epoch, owner)
        onlooker.clock.wait(min(pause, left))


def join(run: Storage, ticket: str, *, clock: Clock | None = None, process: Process | None = None) -> Lease:
    """Become the writer that works for the owner of `ticket`; a writer before this one is shut out.

    If that one may still believe in its lease, this waits until it can't. Raises LeaseLostError, StorageError.
    """
    values = json.loads(ticket)
    owner = Seat(values["epoch"])
    onlooker = Onlooker(run, clock or Clock(), process or this_process())
    while True:
        seen = onlooker.look()
        newest = max(seen, default=owner)
        record = seen[owner].record if owner in seen else None
        if newest.epoch != owner.epoch or record is None or record.released or record.token != values["token"]:
            winner = seen.get(Seat(newest.epoch))
            now = winner.record.process if winner and winner.record and not winner.record.released else None
            raise _lost_to(run, owner, Seat(newest.epoch), now)
        lease = _claim(onlooker, Seat(owner.epoch, newest.number + 1), values["duration"], seen)
        if lease is not None:
            return lease


def holder(run: Storage, *, process: Process | None = None) -> Process | None:
    """Who owns the run now, for those who only take care of it: one look, without a write or a wait.

    Judged by this host's clock, so an owner that died elsewhere may count for two durations.
    Raises StorageError.
    """
    newest = max(
        ((seat, entry.modified) for entry in run.list(FOLDER) if (seat := Seat.parse(entry.name)) and not seat.number),
        default=None,
    )
    if newest is None:
        return None
    try:
        record = parse_record(run.read_bytes(newest[0].name))
    except FileNotFoundError:
        return None
    if record is None or record.released or is_certainly_dead(record.process, process or this_process()):
        return None
    return record.process if time.time() - newest[1] <= 2 * record.duration else None


def _claim(onlooker: Onlooker, seat: Seat, duration: float, before: Iterable[Seat]) -> Lease | None:
    """Make the file of `seat` and wait until nobody of `before` can believe in theirs. None: someone else was first."""
    taken = onlooker.clock.now()
    record = LeaseRecord(onlooker.process, secrets.token_hex(16), time.time(), duration)
    if not onlooker.run.create_new(seat.name, record.to_json()):
        return None
    lease = Lease(onlooker.run, seat, record, onlooker.clock, taken)
    try:
        # Only now can it be known who renews no more: whoever does from now on sees our file.
        while any(map(seat.follows, before)):
            left = silence_left(seen for other, seen in onlooker.look().items() if seat.follows(other))
            if not left:
                break
            onlooker.clock.wait(min(left, duration * RENEWAL, _LOOK_SECONDS))
            lease.renew()
        lease.confirm()
    except LeaseLostError:
        return None
    except (RayTrackingError, KeyboardInterrupt):
        lease.release()
        raise
    clear_before(onlooker.run, seat)
    return lease


def _held_by(run: Storage, epoch: int, owner: Seen) -> LeaseHeldError:
    record, left = owner.record, expires_in(owner)
    if record is None:
        who = "has a lease that can't be read (cut off or damaged)"
        what = f"If nothing writes the run, try again in {left:.0f} s."
    else:
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(record.acquired))
        who = f"is being written by another process: {record.process}, since {since}"
        what = f"Let it end, or stop it. If it has died, try again in {left:.0f} s."
    return LeaseHeldError(
        f"The run {_run_id(run)!r} {who}. Its lease (number {epoch}) runs out in {left:.0f} s unless it is renewed.",
        run=_run_id(run),
        epoch=epoch,
        process=record.process if record else None,
        expires_in=left,
        hint=f"{what} Or give this one a run of its own: another run id (--run-id, --force-new).",
    )


def _lost_to(run: Storage, mine: Seat, winner: Seat, process: Process | None) -> LeaseLostError:
    return LeaseLostError(
        f"The run {_run_id(run)!r} is no longer written by this process ({this_process()}, lease number {mine}) "
        f"but by {process or 'another one, or it has ended'} (lease number {winner}).",
        run=_run_id(run),
        epoch=winner.epoch,
        process=process,
        hint="It was stopped, or cut off from the storage, for longer than its lease. Nothing more of it is written: "
        "end it; the other one goes on.",
    )


def _run_id(run: Storage) -> str:
    return run.root.rpartition("/")[2]
