"""What flows: from the training function into the journal, and from the journal to every reader.

In: values as the user logs them. Out: `Record`, one row of the journal. Imports nothing of the package but errors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple


class Kind(StrEnum):
    """The kinds of record. The value is what stands in the journal's column `kind`."""

    SCALAR = "scalar"  # value = the number
    HISTOGRAM = "histogram"  # data = Histogram as JSON
    TEXT = "text"  # data = UTF-8
    IMAGE = "image"  # data = PNG
    PARAM = "param"  # data = the value as JSON
    TAG = "tag"  # data = UTF-8
    ARTIFACT = "artifact"  # data = Artifact as JSON; the file lies under artifacts/
    RANK_SCALAR = "rank_scalar"  # value = the number; every rank's own, shown as mean, min and max over the ranks
    ATTEMPT = "attempt"  # a new attempt begins; step = the step it resumed from, -1 for a fresh start


NUMERIC = frozenset({Kind.SCALAR, Kind.RANK_SCALAR})
"""The kinds whose records carry a `value`; those of all others but ATTEMPT carry `data`."""


class Record(NamedTuple):
    """One row of the journal.

    `offset` is the row's position in the journal (0, 1, 2, ... over all attempts; -1 before it is appended).
    `seq` numbers the log calls of one sender (`attempt`, `rank`), from 1: rows of one call share it.
    `time` is Unix time in seconds, `step` the training step.
    """

    kind: Kind
    key: str
    step: int
    time: float
    value: float | None = None
    data: bytes | None = None
    rank: int = 0
    attempt: int = 1
    seq: int = 0
    offset: int = -1


class Event(NamedTuple):
    """One log call on its way from a sender: `payload` is `{key: number}` for scalars, else `{key: bytes}`.

    Built of plain values only, so that `marshal` can carry it between processes.
    """

    seq: int
    kind: str
    step: int
    time: float
    payload: dict[str, Any]


def records_of(event: Event, *, rank: int, attempt: int) -> list[Record]:
    """The journal rows of one log call, in the order of its keys."""
    seq, name, step, time, payload = event
    kind = Kind(name)
    if kind in NUMERIC:
        return [
            Record(kind, _text(key), step, time, _float(value), None, rank, attempt, seq)
            for key, value in payload.items()
        ]
    return [Record(kind, _text(key), step, time, None, data, rank, attempt, seq) for key, data in payload.items()]


def _text(key: Any) -> str:
    """A key as text that UTF-8 can hold."""
    text = str(key)
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _float(number: Any) -> float:
    try:
        return float(number)
    except OverflowError:  # an int beyond 1.8e308
        return math.inf if number > 0 else -math.inf


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of values per bin: `edges` [B + 1] ascending, `counts` [B]; `total` and `total_squares` sum the values."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    total: float
    total_squares: float

    def encode(self) -> bytes:
        return json.dumps(
            {
                "edges": self.edges,
                "counts": self.counts,
                "total": self.total,
                "total_squares": self.total_squares,
            }
        ).encode()

    @classmethod
    def decode(cls, data: bytes) -> Histogram:
        fields = json.loads(data)
        return cls(
            tuple(fields["edges"]),
            tuple(fields["counts"]),
            fields["total"],
            fields["total_squares"],
        )


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file kept with the run: `path` below the run's `artifacts/`, `size` in bytes, `digest` xxh3-128 in hex."""

    path: str
    size: int
    digest: str

    def encode(self) -> bytes:
        return json.dumps({"path": self.path, "size": self.size, "digest": self.digest}).encode()

    @classmethod
    def decode(cls, data: bytes) -> Artifact:
        fields = json.loads(data)
        return cls(fields["path"], fields["size"], fields["digest"])


def encode_params(params: Mapping[str, Any]) -> dict[str, bytes]:
    """Params as a payload: each value as JSON, what JSON lacks as its `str`."""
    return {str(key): json.dumps(value, default=str).encode() for key, value in params.items()}
