from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from ray_tracking.runs.store import RunStore
from tests.cli.conftest import Cli
from tests.monitoring.builder import RunBuilder, scalars


def test_export(cli: Cli, store: RunStore, tmp_path: Path) -> None:
    RunBuilder(store, "a").log(scalars(range(1, 4)))
    done = cli("export", "latest", "-o", "h.parquet")
    assert (done.code, done.out) == (0, "")
    assert "3 rows of a" in done.err
    assert pq.read_table(tmp_path / "h.parquet").column("step").to_pylist() == [1, 2, 3]
    again = cli("export", "a", "-o", "h.parquet")
    assert (again.code, "--force" in again.err) == (2, True)
    assert cli("export", "a", "-o", "h.parquet", "--force").code == 0


def test_an_unknown_ending_is_2_and_said_before_the_run_is_looked_for(cli: Cli) -> None:
    done = cli("export", "nope", "-o", "h.xlsx")
    assert done.code == 2
    assert ".parquet, .csv, .jsonl" in done.err
