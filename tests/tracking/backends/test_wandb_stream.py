"""Rows sent straight to W&B's service are what `run.log` makes of them, read by W&B's own inspector."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from ray_tracking.records import Histogram, Kind, Record
from ray_tracking.tracking.backends.base import RunInfo
from ray_tracking.tracking.backends.wandb import WandbBackend
from ray_tracking.tracking.backends.wandb_stream import Stream, encoded, is_plain
from tests.readback import wandb_records, wandb_rows
from tests.tracking.backends.records import png, record, scalars

ODD = {"a": 1.0, "b": -0.0, "c": 1e-7, "d": 1e300, "e": 0.1 + 0.2, "f": math.nan, "g": math.inf, "h": -math.inf}


def logged() -> list[list[Record]]:
    """Batches that split steps; odd values and keys, late steps, texts, and media among plain rows."""
    histogram = Histogram((0.0, 1.0, 2.0), (3, 5), 1.0, 2.0).encode()
    records = [
        *scalars([(key, step, ODD[key] + step) for step in range(1, 8) for key in ODD]),
        *scalars([("a.b/c d", 8, 1.0), ("ü🎉", 8, 2.0), ("a", 3, 7.0)]),
        record(Kind.TEXT, "note", 'say "häppy" 🎉\n'.encode(), step=9),
        record(Kind.HISTOGRAM, "grad", histogram, step=9),
        *scalars([("a", 10, 1.0)]),
        record(Kind.IMAGE, "digits", png(7, 3), step=11),
        *scalars([("b", 11, 5.0), ("a", 12, 2.0), ("b", 12, 3.0)]),
    ]  # fmt: skip
    records = [one._replace(offset=i) for i, one in enumerate(records)]
    return [records[i : i + 7] for i in range(0, len(records), 7)]


def shown(folder: str, run_id: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows without what differs from run to run (times and file names), and the last summary of each key."""
    summary: dict[str, Any] = {}
    for entry in wandb_records(folder, run_id):
        if entry["type"] == "summary":
            summary |= entry["summary"]["update"]
    rows = wandb_rows(folder, run_id)
    for items in (*rows, summary):
        for name in ("_runtime", "_wandb", "_wandb.runtime", "digits.path", "digits._latest_artifact_path"):
            items.pop(name, None)
    return rows, summary


def comparable(items: dict[str, Any]) -> list[str]:
    return sorted(map(repr, items.items()))


def write_all(run_id: str, local_dir: Path) -> str:
    backend = WandbBackend()
    identity = backend.open(RunInfo(run_id, "", local_dir=str(local_dir)), None)
    for batch in logged():
        backend.write(batch)
    backend.close("completed")
    return identity.location


def test_the_same_rows_and_summary_as_by_run_log(local_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_all("straight", local_dir)
    monkeypatch.setattr(Stream, "of", lambda run: None)
    write_all("logged", local_dir)
    rows, summary = shown(folder, "straight")
    by_log, summary_by_log = shown(folder, "logged")
    assert [comparable(row) for row in rows] == [comparable(row) for row in by_log]
    assert [row["_step"] for row in rows] == [*range(1, 13)]
    assert comparable(summary) == comparable(summary_by_log)
    assert (summary["b"], summary["a.b/c d"], summary["_offset"]) == (3, 1, 65)


def test_runtime_counts_from_the_first_record(local_dir: Path) -> None:
    backend = WandbBackend()
    folder = backend.open(RunInfo("r1", "", local_dir=str(local_dir)), None).location
    backend.write(scalars([("a", step, 1.0) for step in (1, 2, 5)]))  # of years ago, a step a second
    backend.close("completed")
    assert [row["_runtime"] for row in wandb_rows(folder, "r1")] == [0, 1, 4]


def test_a_connection_it_does_not_know_is_left_to_run_log() -> None:
    class Run:
        _interface = object()

    assert Stream.of(Run()) is None
    assert Stream.of(object()) is None


def test_values_as_json() -> None:
    values = [1.5, 1e300, 3, None, 'ü"', math.nan, math.inf, -math.inf, True]
    assert [encoded(value) for value in values] == [
        "1.5", "1e+300", "3", "null", '"\\u00fc\\""', "NaN", "Infinity", "-Infinity", "true",
    ]  # fmt: skip
    assert is_plain((1, {"a": 1.0, "b": "x", "c": None}))
    assert not is_plain((1, {"a": 1.0, "b": object()}))
