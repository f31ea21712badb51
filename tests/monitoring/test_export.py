from __future__ import annotations

import csv
import json
import math
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ray_tracking.errors import StorageError, UsageError
from ray_tracking.monitoring.export import COLUMNS, export_run
from ray_tracking.records import Kind, Record
from ray_tracking.runs.store import RunStore
from tests.monitoring.builder import RunBuilder, scalars


@pytest.fixture
def run(store: RunStore) -> RunBuilder:
    """Steps 1 to 6, killed, resumed from 3, steps 4 to 8: the effective history has each step once."""
    run = RunBuilder(store, "a").log(scalars(range(1, 7)))
    run.log([Record(Kind.TEXT, "note", 2, 1.0, None, b"x", seq=7)])
    return run.resume(3).log(scalars(range(4, 9), attempt=2, scale=2.0))


EXPECTED = [
    ("val/loss", step, (1.0 if step <= 3 else 2.0) / step, 1000.0 + step, 0, 1 if step <= 3 else 2)
    for step in range(1, 9)
]


def test_parquet(run: RunBuilder, tmp_path: Path) -> None:
    assert export_run(run.directory, tmp_path / "h.parquet") == 8
    table = pq.read_table(tmp_path / "h.parquet")
    assert tuple(table.column_names) == COLUMNS
    assert [tuple(row.values()) for row in table.to_pylist()] == EXPECTED


def test_csv(run: RunBuilder, tmp_path: Path) -> None:
    export_run(run.directory, tmp_path / "h.CSV")
    with open(tmp_path / "h.CSV", newline="") as stream:
        header, *rows = csv.reader(stream)
    assert tuple(header) == COLUMNS
    assert [(k, int(s), float(v), float(t), int(r), int(a)) for k, s, v, t, r, a in rows] == EXPECTED


def test_jsonl(run: RunBuilder, tmp_path: Path) -> None:
    export_run(run.directory, tmp_path / "h.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "h.jsonl").read_text().splitlines()]
    assert tuple(rows[0]) == COLUMNS
    assert [tuple(row.values()) for row in rows] == EXPECTED


def test_values_json_lacks_are_kept(store: RunStore, tmp_path: Path) -> None:
    values = [math.nan, math.inf, -math.inf, 1.0]
    RunBuilder(store, "b").log([Record(Kind.SCALAR, "x", i, 1.0, v, seq=i) for i, v in enumerate(values, 1)])

    export_run(store.directory("b"), tmp_path / "h.jsonl")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    rows = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "h.jsonl").read_text().splitlines()]
    assert str([float(row["value"]) for row in rows]) == str(values)


@pytest.mark.parametrize("name", ["h.txt", "h", "h.json"])
def test_an_unknown_ending_names_the_allowed_ones(run: RunBuilder, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"\.parquet, \.csv, \.jsonl"):
        export_run(run.directory, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_an_existing_file_is_kept_without_force(run: RunBuilder, tmp_path: Path) -> None:
    output = tmp_path / "h.csv"
    output.write_text("precious")
    with pytest.raises(UsageError, match="--force"):
        export_run(run.directory, output)
    assert output.read_text() == "precious"
    export_run(run.directory, output, force=True)
    assert output.read_text().startswith('"key","step"')


def test_a_missing_folder_and_a_folder_as_file(run: RunBuilder, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder"):
        export_run(run.directory, tmp_path / "no" / "h.csv")
    (tmp_path / "d.csv").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        export_run(run.directory, tmp_path / "d.csv", force=True)


def test_a_failed_write_leaves_nothing(run: RunBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="No space left"):
        export_run(run.directory, out / "h.csv")
    assert list(out.iterdir()) == []


def test_a_run_without_a_metric_gives_an_empty_table(store: RunStore, tmp_path: Path) -> None:
    RunBuilder(store, "empty")
    assert export_run(store.directory("empty"), tmp_path / "h.parquet") == 0
    assert tuple(pq.read_table(tmp_path / "h.parquet").column_names) == COLUMNS
