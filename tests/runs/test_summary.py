"""What `runs show` prints of metrics, kept as records arrive."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ray_tracking.journal.reader import JournalReader
from ray_tracking.journal.writer import JournalWriter
from ray_tracking.records import Kind, Record
from ray_tracking.runs.summary import MetricSummary, Summary, better_mode
from ray_tracking.storage import Storage


def scalar(offset: int, key: str, step: int, value: float, attempt: int = 1) -> Record:
    return Record(Kind.SCALAR, key, step, 1.0, value, attempt=attempt, offset=offset)


def test_last_least_and_greatest_over_finite_values() -> None:
    summary = Summary()
    values = [math.nan, 3.0, -math.inf, 1.0, math.inf, 2.0, math.nan]
    summary.add(scalar(i, "loss", i + 1, value) for i, value in enumerate(values))
    metric = summary.metrics["loss"]
    assert math.isnan(metric.last)
    assert (metric.last_step, metric.least, metric.greatest, metric.count) == (7, 1.0, 3.0, 7)
    assert (summary.offset, summary.last_step) == (7, 7)
    summary.add([scalar(3, "loss", 99, -9.0)])
    assert summary.last_step == 7  # known already


def test_a_rank_s_own_metrics_are_not_the_run_s() -> None:
    summary = Summary()
    summary.add([Record(Kind.RANK_SCALAR, "loss", 4, 1.0, 0.5, rank=1, offset=0)])
    assert (summary.metrics, summary.last_step, summary.offset) == ({}, 4, 1)


@pytest.mark.parametrize(
    ("key", "mode"),
    [("val/loss", "min"), ("accuracy", "max"), ("test/F1", "max"), ("acc_error", "min"), ("lr", "min"), ("mon", "max")],
)
def test_which_end_is_best(key: str, mode: str) -> None:
    assert better_mode(key, "mon", "max") == mode


def test_saved_and_loaded(tmp_path: Path) -> None:
    run = Storage.open(tmp_path)
    summary = Summary(updated=5.0)
    summary.add([scalar(0, "a", 1, 1.0), scalar(1, "b", 2, math.nan)])
    summary.save(run)
    assert repr(Summary.load(run)) == repr(summary)
    assert Summary.load(run.child("other")) == Summary()


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"3", b'{"offset": 1}', b'{"metrics": []}'])
def test_a_damaged_one_is_made_anew(tmp_path: Path, damage: bytes) -> None:
    run = Storage.open(tmp_path)
    run.write_bytes("summary.json", damage)
    assert Summary.load(run) == Summary()


def test_metrics_of_the_effective_history_alone(tmp_path: Path) -> None:
    run = Storage.open(tmp_path)
    writer = JournalWriter(run, 1)
    summary = Summary()
    summary.add(writer.append([scalar(-1, "loss", step, -float(step)) for step in range(1, 6)]))
    summary.add(writer.append([scalar(-1, "odd", 1, math.nan), scalar(-1, "late", 5, 1.0)]))
    writer.begin_attempt(2)
    begun = writer.append([Record(Kind.ATTEMPT, "attempt", 2, 1.0, None, b"", attempt=2)])
    summary.add(begun)
    assert summary.last_step == 2
    summary.replace_metrics(JournalReader(run).effective())
    assert summary.metrics["loss"] == MetricSummary(-2.0, 2, -2.0, -1.0, 2)
    assert "late" not in summary.metrics
    assert (summary.metrics["odd"].least, summary.metrics["odd"].count) == (None, 1)
