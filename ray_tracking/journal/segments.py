"""What a segment is: one immutable file whose name alone tells its offsets and its digest.

In: file names and sizes from a listing. Out: which files to read, which are leftovers, which to merge. Pure.

    journal/attempt-001/000000000000-000000000999-<xxh3-64 of the file>.arrow   as appended or merged
    journal/attempt-001/<the same>-000003.0001.arrow                            with the lease of its writer: `term`
    journal/history.parquet/000000000000-000000123456-<xxh3-64>.parquet         compacted: a Parquet data set

Offsets rise from one writer to the next. So what a writer that was shut out still writes late is known by its name: it
reaches to where a later writer had begun.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ROOT = "journal"
HISTORY = "history.parquet"
FAN_OUT = 16
_ROW = 64  # bytes of one scalar row in memory
TARGET = 64 << 20
"""The most a merge or a history file gathers, in bytes in memory: what bounds the tracker's memory."""

_NAME = re.compile(
    rf"^{ROOT}/(?:attempt-(?P<attempt>\d{{3,}})|{re.escape(HISTORY)})"
    r"/(?P<first>\d{12,})-(?P<last>\d{12,})-(?P<digest>[0-9a-f]{16})"
    r"(?:-(?P<epoch>\d{6,})\.(?P<number>\d{4,}))?\.(?P<suffix>arrow|parquet)$"
)

Term = tuple[int, int]
"""Which writer of a run: the epoch of its lease, and its number under that owner. Each next one's is higher."""
NO_TERM: Term = (0, 0)


@dataclass(frozen=True, slots=True)
class Segment:
    """Offsets `first` to `last`, both included. `attempt` is its folder's, None in the history.

    `term` is its writer's, of merged segments their last one's; the history has none.
    """

    first: int
    last: int
    digest: str
    attempt: int | None
    size: int = 0
    term: Term = NO_TERM

    @property
    def name(self) -> str:
        """Its path below the run's directory."""
        folder, suffix = (HISTORY, "parquet") if self.attempt is None else (f"attempt-{self.attempt:03d}", "arrow")
        term = "" if self.term == NO_TERM or self.attempt is None else f"-{self.term[0]:06d}.{self.term[1]:04d}"
        return f"{ROOT}/{folder}/{self.first:012d}-{self.last:012d}-{self.digest}{term}.{suffix}"

    @property
    def writer(self) -> tuple[int, int, int]:
        """Orders the writers of segments that are no history: by term, without leases by attempt."""
        return *self.term, self.attempt or 0

    @property
    def rows(self) -> int:
        return self.last - self.first + 1

    @property
    def weight(self) -> int:
        """Its size in memory, about: scalars compress well on disk, images don't."""
        return max(self.size, self.rows * _ROW)


@dataclass(frozen=True, slots=True)
class Layout:
    """A listing sorted out: `live` (by offset, no overlap), `covered` by one of them, `clashing`, or `late`.

    `late` ones were written by a writer that was shut out: never acknowledged, no part of the journal.
    """

    live: tuple[Segment, ...]
    covered: tuple[Segment, ...]
    clashing: tuple[Segment, ...]
    late: tuple[Segment, ...] = ()

    @property
    def next_offset(self) -> int:
        return max((segment.last + 1 for segment in (*self.live, *self.clashing)), default=0)

    def up_to(self, end: int) -> Layout:
        """Without the segments that begin at offset `end` or later."""
        parts = (self.live, self.covered, self.clashing, self.late)
        return Layout(*(tuple(segment for segment in part if segment.first < end) for part in parts))


def parse(name: str, size: int) -> Segment | None:
    """The segment of that name (relative to the run's directory), or None for a file that is none."""
    found = _NAME.match(name)
    if found is None:
        return None
    attempt = int(found["attempt"]) if found["attempt"] else None
    term = (int(found["epoch"]), int(found["number"])) if found["epoch"] else NO_TERM
    segment = Segment(int(found["first"]), int(found["last"]), found["digest"], attempt, size, term)
    return segment if segment.name == name and segment.rows > 0 else None


def layout(segments: Iterable[Segment]) -> Layout:
    """The widest segment wins over those within it: a merge or compaction that was cut off leaves both.

    Segments that overlap in part are never written by one writer: they are reported, not read.
    """
    every = sorted(segments, key=lambda one: (one.first, -one.last, one.attempt is not None, one.digest))
    late = _late(every)
    live, covered, clashing = _sweep([one for one in every if one not in late])
    return Layout(tuple(live), tuple(covered), tuple(clashing), tuple(one for one in every if one in late))


def _sweep(ordered: Iterable[Segment]) -> tuple[list[Segment], list[Segment], list[Segment]]:
    """(live, covered, clashing) of segments by first offset, the widest first."""
    live: list[Segment] = []
    covered: list[Segment] = []
    clashing: list[Segment] = []
    end = -1
    for segment in ordered:
        if segment.first > end:
            live.append(segment)
            end = segment.last
        elif segment.last <= end:
            covered.append(segment)
        else:
            clashing.append(segment)
    return live, covered, clashing


def _late(ordered: Sequence[Segment]) -> set[Segment]:
    """Those that reach past where a later writer began, or out of a file of the history, which holds whole segments."""
    starts: dict[tuple[int, int, int], int] = {}
    for segment in ordered:
        if segment.attempt is not None:
            starts.setdefault(segment.writer, segment.first)
    history = _sweep(one for one in ordered if one.attempt is None)[0]
    if len(starts) < 2 and not history:
        return set()
    ends: dict[tuple[int, int, int], float] = {}
    end = float("inf")
    for writer in sorted(starts, reverse=True):
        ends[writer] = end
        end = min(end, starts[writer])
    firsts = [one.first for one in history]

    def sticks_out(segment: Segment) -> bool:
        at = bisect_right(firsts, segment.last) - 1  # the last file that begins before its end
        if at < 0 or history[at].last < segment.first:
            return False
        return not (history[at].first <= segment.first and segment.last <= history[at].last)

    return {one for one in ordered if one.attempt is not None and (one.last >= ends[one.writer] or sticks_out(one))}


def gaps(live: Sequence[Segment], start: int) -> list[tuple[int, int]]:
    """The offset ranges from `start` on, both ends included, that are missing before a later live segment."""
    missing = []
    for segment in live:
        if segment.first > start:
            missing.append((start, segment.first - 1))
        start = max(start, segment.last + 1)
    return missing


def plan_merge(live: Sequence[Segment], barriers: frozenset[str] = frozenset()) -> tuple[Segment, ...]:
    """The neighbours to merge next, or (): the lightest `FAN_OUT` in a row of which none outweighs the rest.

    So a row's segment at least doubles each time it is rewritten, and few segments lie between two full ones.
    Neighbours share an attempt's folder and have no gap between them. `barriers` are names not to touch.
    """
    best: tuple[int, tuple[Segment, ...]] | None = None
    run: list[Segment] = []
    for segment in live:
        if segment.attempt is None or segment.weight > TARGET // 2 or segment.name in barriers:
            run = []
            continue
        if run and (run[-1].attempt != segment.attempt or run[-1].last + 1 != segment.first):
            run = []
        run.append(segment)
        weights = [one.weight for one in run[-FAN_OUT:]]
        total = sum(weights)
        if len(weights) == FAN_OUT and 2 * max(weights) <= total and (best is None or total < best[0]):
            best = total, tuple(run[-FAN_OUT:])
    return _within_target(best[1]) if best else ()


def plan_history(live: Sequence[Segment], barriers: frozenset[str] = frozenset()) -> list[tuple[Segment, ...]]:
    """Groups of neighbours, each to become one file of the history.

    Small files of the history are taken in again: a run resumed many times doesn't end as many of them.
    """
    groups: list[tuple[Segment, ...]] = []
    group: list[Segment] = []

    def close() -> None:
        if any(segment.attempt is not None for segment in group):
            groups.append(tuple(group))
        group.clear()

    for segment in live:
        done = segment.attempt is None and segment.weight > TARGET // 2
        if segment.name in barriers or done:
            close()
            continue
        too_much = sum(one.weight for one in group) + segment.weight > TARGET
        if group and (too_much or group[-1].last + 1 != segment.first):
            close()
        group.append(segment)
    close()
    return groups


def _within_target(run: Sequence[Segment]) -> tuple[Segment, ...]:
    taken = list(run[:2])
    for segment in run[2:]:
        if sum(one.weight for one in taken) + segment.weight > TARGET:
            break
        taken.append(segment)
    return tuple(taken)
