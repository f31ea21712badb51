"""Which rank hangs: judged from what each rank says of itself now and then. Pure, but for a clock that is given.

In: reports of the ranks of one worker group. Out: a `Verdict` that names those that hold up the others.

All ranks of a group stand still as soon as one does. So the one to blame is told by where it stands: it is not waiting
for others (in a collective), or it says nothing any more.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ray_tracking.runs.process import Process

_PATIENCE = 3
"""How many times as long a rank may stay away that computes, works on storage, has not begun its first step, or that
nobody waits for."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a rank says of its training thread. `idle`: seconds since it last got further.

    `computes`: it has used the processor in them. `waits`: it stands in a call that waits for other ranks. `patient`:
    before the first step, or at a checkpoint. `over`: the training function has returned.
    """

    step: int
    idle: float
    computes: bool
    waits: bool
    patient: bool
    process: Process
    over: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """`ranks` hang. `actors` are to end the group: those ranks themselves, or another one for those that don't answer,
    whose `processes` are then given as far as they are known. `text`: for people.
    """

    ranks: tuple[int, ...]
    actors: tuple[int, ...]
    text: str
    processes: Mapping[int, Process]

    @property
    def is_for_others(self) -> bool:
        return self.actors != self.ranks


@dataclass(frozen=True, slots=True)
class Heard:
    """A report that came `age` seconds ago."""

    report: Report
    age: float

    @property
    def still(self) -> float:
        """Seconds without progress, as far as is known."""
        return self.report.idle + self.age


def judge(heard: Mapping[int, Heard], world_size: int, limit: float, since: float) -> Verdict | None:
    """None while all is well, or while it can't be told.

    `limit`: seconds without progress that are too long. `since`: seconds since the first rank of the group was heard.
    """
    lost = {rank for rank, each in heard.items() if each.age >= limit and not each.report.over}
    if since >= limit:
        lost |= set(range(world_size)) - set(heard)
    running = {rank: each for rank, each in heard.items() if rank not in lost and not each.report.over}
    if not running or any(each.still < limit for each in running.values()):
        return None
    if lost:
        return _silent(lost, min(running), heard, limit)
    if len(heard) < world_size or any(each.age > limit / 2 for each in running.values()):
        return None  # it will be heard, or lost
    if all(each.report.computes for each in running.values()):
        return None  # nobody waits: a long validation on every rank
    ended = {rank for rank, each in heard.items() if each.report.over}
    if ended and all(each.report.waits for each in running.values()):
        long_ago = min(heard[rank].age for rank in ended) >= limit
        return _verdict(running, _left_alone(ended, running)) if long_ago else None
    culprits = _culprits(running)
    alone = not any(each.report.waits for each in running.values())
    if any(each.still < limit * _allowance(each.report, alone) for each in map(running.__getitem__, culprits)):
        return None
    return _verdict(culprits, _hung(culprits, heard))


def _culprits(running: Mapping[int, Heard]) -> set[int]:
    """Those that don't wait, first of all those that do nothing at all; the ones furthest behind."""
    active = [rank for rank, each in running.items() if not each.report.waits]
    found = [rank for rank in active if _allowance(running[rank].report) == 1] or active or list(running)
    behind = min(running[rank].report.step for rank in found)
    return {rank for rank in found if running[rank].report.step == behind}


def _allowance(report: Report, alone: bool = False) -> int:
    return _PATIENCE if report.computes or report.patient or alone else 1


def _verdict(ranks: Iterable[int], text: str) -> Verdict:
    named = tuple(sorted(ranks))
    return Verdict(named, named, text, {})


def _hung(ranks: set[int], heard: Mapping[int, Heard]) -> str:
    where = ", ".join(f"rank {rank} ({heard[rank].report.process})" for rank in sorted(ranks))
    step = min(heard[rank].report.step for rank in ranks)
    seconds = max(heard[rank].still for rank in ranks)
    return f"{where} hung at step {step}: no progress for {seconds:.0f} s"


def _silent(ranks: set[int], actor: int, heard: Mapping[int, Heard], limit: float) -> Verdict:
    parts = []
    for rank in sorted(ranks):
        if rank in heard:
            report = heard[rank].report
            parts.append(f"rank {rank} ({report.process}) hung: it answers no more, last seen at step {report.step}")
        else:
            parts.append(f"rank {rank} hung: it never came to the training function")
    seconds = max((heard[rank].age for rank in ranks if rank in heard), default=limit)
    processes = {rank: heard[rank].report.process for rank in ranks if rank in heard}
    return Verdict(tuple(sorted(ranks)), (actor,), f"{'; '.join(parts)}; nothing heard for {seconds:.0f} s", processes)


def _left_alone(ended: set[int], running: Mapping[int, Heard]) -> str:
    waiting = ", ".join(map(str, sorted(running)))
    gone = ", ".join(map(str, sorted(ended)))
    return f"rank {waiting} hung: it waits for rank {gone}, whose training function has returned"


class Roll:
    """The latest report of each rank of the newest worker group. Times are monotonic seconds. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._group = ""
        self._since = 0.0
        self._heard: dict[int, tuple[Report, float]] = {}

    def hear(self, group: str, rank: int, world_size: int, report: Report, limit: float, now: float) -> Verdict | None:
        """Take in what a rank of a group says; what is to be done about the group. Reports of another one are gone."""
        with self._lock:
            if group != self._group:
                self._group, self._since, self._heard = group, now, {}
            self._heard[rank] = (report, now)
            heard = {other: Heard(said, now - when) for other, (said, when) in self._heard.items()}
            return judge(heard, world_size, limit, now - self._since)
