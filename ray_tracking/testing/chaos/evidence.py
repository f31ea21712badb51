"""What a killed run shows beside one that was never killed. Pure: rows of both journals in, differences out."""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from ray_tracking.journal.lineage import STEPLESS
from ray_tracking.records import Kind, Record
from ray_tracking.runs.record import Attempt
from ray_tracking.testing.backends import Point
from ray_tracking.testing.chaos.plan import Hit, Part
from ray_tracking.testing.readback import comparable
from ray_tracking.tracking.reduce import GREATEST, LEAST, MEAN

TIMES = ("*_per_second", "*_per_sec", "*seconds*", "*throughput*")
"""Keys whose values measure time, and so are another's in every run: they must be there, but may differ."""
_SHOWN = 3
_RANK = re.compile(r"rank \d+")

_Place = tuple[str, str, int, int]
"""(kind, key, step, rank)"""


@dataclass(frozen=True, slots=True)
class Difference:
    """`compared` of them against each other, by the undisturbed run's count; `examples` name the first that differ."""

    what: str
    compared: int
    unit: str
    lost: int = 0
    doubled: int = 0
    changed: int = 0
    size: int | None = None
    """Bytes of the tensors among them."""
    examples: tuple[str, ...] = ()
    skipped: str | None = None
    """Why nothing was compared."""

    @property
    def is_equal(self) -> bool:
        return not (self.lost or self.doubled or self.changed)


@dataclass(frozen=True, slots=True)
class Recovery:
    """What became of one hit. `step`: the last that the journal had of the attempt. `restored`: the one that the next
    attempt began from, None if none had to; `repeated`: journaled twice because of it.

    `seconds` until the journal has a step that the run had not reached before; None if it never got there.
    """

    number: int
    part: str
    step: int
    restored: int | None
    repeated: int
    seconds: float | None
    complete: int
    problems: tuple[str, ...] = ()
    victim: str | None = None
    """Which worker, `rank 1` say."""
    outage: float | None = None
    """Seconds for which it was away; None if it was killed."""
    noticed: str | None = None
    """How the run showed that it was away."""

    @property
    def while_training(self) -> bool:
        """Whether the fault came between two steps of the run."""
        return self.step > 0 and self.seconds is not None


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that the command prints."""

    run_id: str
    undisturbed: str
    seed: int
    wanted: int
    recoveries: Sequence[Recovery]
    differences: Sequence[Difference]
    steps: int
    attempts: int
    ignored: Sequence[str] = field(default=())
    """The keys whose values were not compared."""
    synced: Sequence[str] = field(default=())
    """The backends that lacked something when the run had ended, and were filled by `ray-tracking sync`."""

    @property
    def hits(self) -> int:
        return sum(recovery.while_training for recovery in self.recoveries)

    @property
    def shortcomings(self) -> list[str]:
        """Why this is no proof; [] if it is one."""
        found = [
            f"fault {each.number} ({each.part}): a checkpoint that passed for complete does not verify: {problem}"
            for each in self.recoveries
            for problem in each.problems
        ]
        found += [
            f"fault {each.number} ({each.part}): the run did not feel it within {each.outage:.0f} s: lengthen --outage"
            for each in self.recoveries
            if each.outage is not None and each.noticed is None
        ]
        found += [f"{each.what}: {example}" for each in self.differences for example in each.examples]
        found += [f"{each.what} differs" for each in self.differences if not each.is_equal and not each.examples]
        if self.hits < self.wanted:
            found.append(
                f"only {self.hits} of {self.wanted} faults hit while training went on: the run is too short, or lacks "
                "such a part; make it longer (--set params.epochs=...), save more often "
                "(--set training.default.save_steps=...), or lower --times"
            )
        return found


@dataclass(frozen=True, slots=True)
class Ignored:
    """Which keys' values are not compared: shell patterns. The numbers over ranks of such a key count as it."""

    patterns: tuple[str, ...]

    def __contains__(self, key: str) -> bool:
        names = {key, *(key.removesuffix(suffix) for suffix in (MEAN, LEAST, GREATEST))}
        return any(fnmatchcase(name, pattern) for name in names for pattern in self.patterns)


def compare_histories(expected: Iterable[Record], found: Iterable[Record], ignored: Ignored) -> Difference:
    """Two effective histories: the same places as often, and at each the same values bit for bit."""
    wanted, shown = _by_place(expected, ignored), _by_place(found, ignored)
    lost = _missing(wanted, shown)
    doubled = _missing(shown, wanted)
    changed = {
        place: (values, shown[place])
        for place, values in wanted.items()
        if place in shown and place not in lost and place not in doubled and values != shown[place]
    }
    examples = [f"{_named(place)} is lost" for place in sorted(lost)[:_SHOWN]]
    examples += [f"{_named(place)} is there too often" for place in sorted(doubled)[:_SHOWN]]
    examples += [
        f"{_named(place)} is {_readable(place, is_now)} instead of {_readable(place, was)}"
        for place, (was, is_now) in sorted(changed.items())[:_SHOWN]
    ]
    return Difference(
        "journal",
        sum(values.total() for values in wanted.values()),
        "records",
        sum(lost.values()),
        sum(doubled.values()),
        len(changed),
        examples=tuple(examples),
    )


def compare_points(
    backend: str, expected: Iterable[Point], found: Iterable[Point], ignored: Ignored, *, single: bool = False
) -> Difference:
    """What a backend shows against the journal; `single`: it keeps 32-bit floats."""

    def counted(points: Iterable[Point]) -> Counter[tuple[str, int, str]]:
        plain = [(key, step, 0.0 if key in ignored else value) for key, step, value in points]
        return Counter(comparable(plain, single=single))

    def places(points: Counter[tuple[str, int, str]]) -> Counter[tuple[str, int]]:
        total: Counter[tuple[str, int]] = Counter()
        for (key, step, _), count in points.items():
            total[key, step] += count
        return total

    wanted, shown = counted(expected), counted(found)
    lost, doubled = places(wanted) - places(shown), places(shown) - places(wanted)
    changed = [point for point in wanted - shown if point[:2] not in lost]
    examples = [f"{key!r} at step {step} is lost" for key, step in sorted(lost)[:_SHOWN]]
    examples += [f"{key!r} at step {step} is there too often" for key, step in sorted(doubled)[:_SHOWN]]
    examples += [f"{key!r} at step {step} should be {value}" for key, step, value in sorted(changed)[:_SHOWN]]
    return Difference(
        backend, wanted.total(), "points", lost.total(), doubled.total(), len(changed), examples=tuple(examples)
    )


def recoveries(hits: Sequence[Hit], rows: Iterable[Record], attempts: Sequence[Attempt]) -> list[Recovery]:
    """What followed each hit. `rows`: all that was journaled, of all attempts."""
    steps = sorted((row.time, row.attempt, row.step) for row in rows if _is_step(row))
    return [_recovery(hit, steps, attempts) for hit in hits]


def _recovery(hit: Hit, steps: Sequence[tuple[float, int, int]], attempts: Sequence[Attempt]) -> Recovery:
    part = hit.strike.part
    if part.restarts_workers:  # the ranks that are left may log a step more: it counts no more
        before = [each for each in steps if each[1] <= hit.attempt]
        after = [each for each in steps if each[1] > hit.attempt]
    else:
        before = [each for each in steps if each[0] <= hit.time]
        after = [each for each in steps if each[0] > hit.time]
    furthest = max((step for _, _, step in before), default=0)
    here = [(time, step) for time, attempt, step in before if attempt == hit.attempt]
    struck = max((step for time, step in here if time <= hit.time), default=0)
    later = next((time for time, _, step in after if step > furthest), None)
    restored, repeated = None, 0
    if part.restarts_workers:
        begun = (each.resumed_from_step for each in attempts if each.number > hit.attempt)
        restored = next((max(step, 0) for step in begun if step is not None), None)
        repeated = max(0, max((step for _, step in here), default=0) - (restored or 0)) if restored is not None else 0
    reason = next((attempt.reason or "" for attempt in attempts if attempt.number == hit.attempt), "")
    rank = _RANK.match(reason) if part is Part.WORKER else None
    return Recovery(
        hit.strike.number,
        part.value,
        struck,
        restored,
        repeated,
        None if later is None else later - hit.time,
        hit.complete,
        hit.problems,
        rank[0] if rank else None,
        hit.outage,
        hit.noticed,
    )


def _is_step(row: Record) -> bool:
    return row.kind is not Kind.ATTEMPT and row.kind not in STEPLESS and row.step > 0


def _by_place(records: Iterable[Record], ignored: Ignored) -> dict[_Place, Counter[Hashable]]:
    places: dict[_Place, Counter[Hashable]] = {}
    for record in records:
        # A param has no step of its own: it is logged anew by each attempt.
        step = 0 if record.kind in STEPLESS else record.step
        place = (record.kind.value, record.key, step, record.rank)
        places.setdefault(place, Counter())[None if record.key in ignored else _content(record)] += 1
    return places


def _content(record: Record) -> bytes | None:
    return struct.pack("<d", record.value) if record.value is not None else record.data


def _missing(of: Mapping[_Place, Counter[Hashable]], other: Mapping[_Place, Counter[Hashable]]) -> dict[_Place, int]:
    """By place, how many more records `of` has than the other."""
    more = {place: values.total() - other.get(place, Counter[Hashable]()).total() for place, values in of.items()}
    return {place: count for place, count in more.items() if count > 0}


def _named(place: _Place) -> str:
    kind, key, step, rank = place
    return f"{kind} {key!r} at step {step}" + (f" of rank {rank}" if rank else "")


def _readable(place: _Place, contents: Counter[Hashable]) -> str:
    return ", ".join(_one(place[0], content) for content in contents.elements())


def _one(kind: str, content: Any) -> str:
    if not isinstance(content, bytes):
        return "nothing"
    if kind in (Kind.SCALAR, Kind.RANK_SCALAR):
        return repr(struct.unpack("<d", content)[0])
    return repr(content[:40].decode(errors="replace"))
