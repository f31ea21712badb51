"""What a lease file holds and what follows from one: who may take over, when, and whom that shuts out. No I/O.

    lease/000007-0000    the owner (the driver) of the seventh taking
    lease/000007-0002    the second writer (tracker process) that works for it

Each file is made once, by whoever is first, and rewritten by its holder alone; the highest of its kind is the one that
counts. So nothing is ever swapped, and what a stale holder still writes changes nothing.

A holder believes in its lease for `TRUST` of its duration after it has last written its file and then seen nothing
higher. Whoever comes after makes its own, higher file, and begins only when the other one has been silent for `SILENCE`
of the duration by the newcomer's own clock. So the two never work at once, whatever any wall clock says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any, NamedTuple

from ray_tracking.runs.process import Process

FOLDER = "lease"
DEFAULT_SECONDS = 30.0
LONGEST_SECONDS = 86_400.0
RENEWAL = 1 / 3
"""A holder renews after this part of the duration. The order of the three: RENEWAL < TRUST < SILENCE < 1."""
TRUST = 0.45
SILENCE = 0.5
_SKEW_SECONDS = 2.0
"""Modification times on object stores are whole seconds."""
_LAST_TIME = 1e11  # what a calendar can still show
_NAME = re.compile(r"^(\d{6,})-(\d{4,})$")


class Seat(NamedTuple):
    """`epoch` grows by one with each owner, `number` with each writer of one owner; the owner's own is 0."""

    epoch: int
    number: int = 0

    @property
    def name(self) -> str:
        """Its path below the run's directory."""
        return f"{FOLDER}/{self.epoch:06d}-{self.number:04d}"

    @classmethod
    def parse(cls, name: str) -> Seat | None:
        """The seat of a file's name in the folder; None for a file that is none."""
        found = _NAME.match(name)
        return cls(int(found[1]), int(found[2])) if found else None

    def __str__(self) -> str:
        return f"{self.epoch}.{self.number}" if self.number else f"{self.epoch}"

    def shuts_out(self, other: Seat) -> bool:
        """Whether a holder of `other` has to stop because this one exists. Writers don't shut out their owner."""
        return self > other and (other.number > 0 or self.epoch > other.epoch)

    def follows(self, other: Seat) -> bool:
        """Whether what `other` might still write must be over before this one begins."""
        return other.number < self.number and other.number > 0 if other.epoch == self.epoch else other < self


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """One lease file. `acquired`: Unix seconds of the holder's own clock, for people; nothing is judged by it."""

    process: Process
    token: str
    """Random: tells this taking from any other."""
    acquired: float
    duration: float = DEFAULT_SECONDS
    renewals: int = 0
    released: bool = False

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()


def parse_record(data: bytes) -> LeaseRecord | None:
    """None if it is no lease: cut off, damaged or of a version that has other fields."""
    try:
        values = json.loads(data)
        process = Process(**_known(Process, values.pop("process")))
        record = LeaseRecord(process, **_known(LeaseRecord, values))
        sound = (
            isinstance(process.host, str)
            and isinstance(process.pid, int)
            and all(isinstance(part, str) for part in (process.boot, process.namespace, process.started, record.token))
            and isinstance(record.released, bool)
            and 0 < process.pid < 2**31
            and abs(record.acquired) < _LAST_TIME
            and 0 < record.duration <= LONGEST_SECONDS
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if sound else None


def _known(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Only the fields that this version has."""
    names = {field.name for field in fields(kind)}
    return {key: value for key, value in values.items() if key in names}


@dataclass(frozen=True, slots=True)
class Seen:
    """What one onlooker knows of one lease file.

    `record` is None if it can't be read. `age`: seconds since it was written, by the storage's clock (a file that the
    onlooker has just written against this one), negative if that clock was set back. `watched`: seconds since the
    onlooker first read these very bytes, by its own clock. `moved`: it has seen other bytes before. `dead`: the process
    is known to have ended.
    """

    record: LeaseRecord | None
    age: float
    watched: float = 0.0
    moved: bool = False
    dead: bool = False

    @property
    def duration(self) -> float:
        return DEFAULT_SECONDS if self.record is None else self.record.duration

    @property
    def is_over(self) -> bool:
        """Given back, or its holder is known to be dead."""
        return self.dead or (self.record is not None and self.record.released)


class Verdict(StrEnum):
    FREE = "free"
    DOUBTFUL = "doubtful"
    """It has run out by the storage's clock, which may have jumped: watch it for a sign of life first."""
    HELD = "held"


def judge(owner: Seen | None) -> Verdict:
    """Whether the newest owner's lease may be taken over. None: there is none."""
    if owner is None or owner.is_over:
        return Verdict.FREE
    fresh = -_SKEW_SECONDS <= owner.age <= owner.duration
    # Who was seen to renew is alive, whatever the storage's clock says; then only the onlooker's own clock counts.
    if owner.watched <= owner.duration and (fresh or owner.moved):
        return Verdict.HELD
    return Verdict.FREE if owner.watched >= SILENCE * owner.duration else Verdict.DOUBTFUL


def silence_left(before: Iterable[Seen]) -> float:
    """Seconds until none of those who came before can believe in their lease any more; 0 if none can now."""
    return max((max(SILENCE * seen.duration - seen.watched, 0.0) for seen in before if not seen.is_over), default=0.0)


def expires_in(owner: Seen) -> float:
    """Seconds until a lease that is not renewed has run out: as far as can be told, from 0 to its duration."""
    known_silent = owner.watched if owner.moved else max(owner.watched, owner.age)
    return min(max(owner.duration - known_silent, 0.0), owner.duration)
