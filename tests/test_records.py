"""What flows: events to journal rows, and payloads to bytes and back."""

from __future__ import annotations

import json
import math
from datetime import date

import pytest

from ray_tracking.records import Artifact, Event, Histogram, Kind, Record, encode_params, records_of


def test_a_log_call_becomes_a_row_per_key_in_order() -> None:
    event = Event(7, "scalar", 3, 12.5, {"b": 1, "a": 2.5})
    assert list(records_of(event, rank=2, attempt=4)) == [
        Record(Kind.SCALAR, "b", 3, 12.5, 1.0, None, 2, 4, 7),
        Record(Kind.SCALAR, "a", 3, 12.5, 2.5, None, 2, 4, 7),
    ]
    assert list(records_of(event._replace(payload={}), rank=0, attempt=1)) == []


@pytest.mark.parametrize(
    ("value", "stored"),
    [(True, 1.0), (2**63 + 1, float(2**63)), (10**400, math.inf), (-(10**400), -math.inf), (math.inf, math.inf)],
)
@pytest.mark.parametrize("kind", [Kind.SCALAR, Kind.RANK_SCALAR])
def test_every_number_fits(kind: Kind, value: float, stored: float) -> None:
    (row,) = records_of(Event(1, kind.value, 1, 1.0, {"k": value}), rank=0, attempt=1)
    assert (row.kind, row.value, row.data) == (kind, stored, None)


def test_bytes_stay_bytes() -> None:
    (row,) = records_of(Event(1, "image", 1, 1.0, {"k": b"png"}), rank=0, attempt=1)
    assert (row.value, row.data) == (None, b"png")


@pytest.mark.parametrize(
    ("key", "stored"), [(1, "1"), (("a", 2), "('a', 2)"), ("\ud800x", "?x"), ("é🎉", "é🎉"), ("", "")]
)
def test_every_key_is_text(key: object, stored: str) -> None:
    (row,) = records_of(Event(1, "scalar", 1, 1.0, {key: 1.0}), rank=0, attempt=1)  # type: ignore[dict-item]
    assert row.key == stored
    row.key.encode()


def test_an_unknown_kind_is_no_event() -> None:
    with pytest.raises(ValueError, match="hologram"):
        list(records_of(Event(1, "hologram", 1, 1.0, {"k": 1.0}), rank=0, attempt=1))


def test_payloads_come_back() -> None:
    histogram = Histogram((0.0, 0.5, 1.0), (3, 4), 2.5, math.inf)
    assert Histogram.decode(histogram.encode()) == histogram
    artifact = Artifact("a/b.txt", 3, "ff")
    assert Artifact.decode(artifact.encode()) == artifact
    params = encode_params({"lr": 0.1, 3: None, "when": date(2026, 1, 2), "deep": {"a": [1, "é"]}})
    assert {key: json.loads(value) for key, value in params.items()} == {
        "lr": 0.1, "3": None, "when": "2026-01-02", "deep": {"a": [1, "é"]},
    }  # fmt: skip
