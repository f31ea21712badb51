"""The direct way into MLflow's tables leaves the same rows as MLflow's own client does."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ray_tracking.errors import BackendError
from ray_tracking.tracking.backends import mlflow_sql
from ray_tracking.tracking.backends.base import RunInfo
from ray_tracking.tracking.backends.mlflow import MLflowBackend
from ray_tracking.tracking.backends.mlflow_sql import Metric, SqlMetrics
from tests.tracking.backends.records import grid, scalars

BATCHES = [
    [Metric(f"m{key}", step / 3 + key, 1000 + step, step) for step in range(1, 400) for key in range(4)],
    [Metric("m0", -5.0, 999, 1), Metric("m1", 7.0, 5000, 399), Metric("m2", 1e300, 1000, 500)],  # older, equal, newer
    [Metric("odd", value, 1, 1) for value in (math.nan, math.inf, -math.inf, 0.0, -0.0, 5e-324, 1e308)],
    [Metric("odd", math.nan, 1, 1), Metric("odd", math.nan, 2, 1), Metric("odd", 0.0, 2, 1)],
    [Metric("twice", 1.0, 1, 1), Metric("twice", 1.0, 1, 1), Metric("twice", 2.0, 1, 1), Metric("twice", 1.5, 1, 1)],
    [Metric("twice", 1.0, 1, 1), Metric("twice", 3.0, 1, 1), Metric("new", 1.0, 2, -3)],  # some are there already
    [Metric("lr/group 0.1", 1e-9, 1_700_000_000_123, 2**62)],
]


def rows(path: Path, table: str, run_id: str) -> list[tuple[Any, ...]]:
    columns = "key, value, timestamp, step, is_nan"
    with sqlite3.connect(path) as connection:
        found = connection.execute(f"SELECT {columns} FROM {table} WHERE run_uuid = ?", (run_id,)).fetchall()
    return sorted(found)


def by_client(client: Any, run_id: str, metrics: Sequence[Metric]) -> None:
    from mlflow.entities import Metric as Entity

    client.log_batch(run_id, [Entity(*metric) for metric in metrics])


def test_the_same_rows_as_by_log_batch(mlflow_dir: Path) -> None:
    from mlflow import MlflowClient

    path = mlflow_dir / "mlflow.db"
    client = MlflowClient(f"sqlite:///{path}")
    direct = SqlMetrics.of(client)
    assert direct is not None
    mine, theirs, mixed = (client.create_run("0").info.run_id for _ in range(3))
    for i, batch in enumerate(BATCHES):
        assert direct.write(mine, batch)
        by_client(client, theirs, batch)
        if i % 2:
            assert direct.write(mixed, batch)
        else:
            by_client(client, mixed, batch)
        for table in ("metrics", "latest_metrics"):
            assert rows(path, table, mine) == rows(path, table, theirs) == rows(path, table, mixed)
    assert direct.write(mine, [metric for batch in BATCHES for metric in batch])
    for table in ("metrics", "latest_metrics"):
        assert rows(path, table, mine) == rows(path, table, theirs)
    assert len(rows(path, "metrics", mine)) > 1600
    assert client.get_run(mine).data.metrics["m0"] == 399 / 3


def test_nothing_is_written_to_a_run_that_was_deleted(mlflow_dir: Path, run_info: RunInfo) -> None:
    from mlflow import MlflowClient

    backend = MLflowBackend()
    identity = backend.open(run_info, None)
    client = MlflowClient(identity.location)
    client.delete_run(identity.run_id)
    direct = SqlMetrics.of(client)
    assert direct is not None
    assert not direct.write(identity.run_id, BATCHES[0])
    assert direct.write(identity.run_id, [])
    with pytest.raises(BackendError, match="must be in the 'active' state"):
        backend.write(scalars(grid([1])))
    assert rows(mlflow_dir / "mlflow.db", "metrics", identity.run_id) == []


def test_a_batch_that_fails_leaves_nothing(mlflow_dir: Path) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    path = mlflow_dir / "mlflow.db"
    client = MlflowClient(f"sqlite:///{path}")
    direct = SqlMetrics.of(client)
    assert direct is not None
    run_id = client.create_run("0").info.run_id
    with pytest.raises(MlflowException):
        direct.write(run_id, [*BATCHES[0], Metric("far", 1.0, 1, 2**70)])
    assert rows(path, "metrics", run_id) == rows(path, "latest_metrics", run_id) == []


def test_what_it_does_not_know_is_left_to_the_client(mlflow_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    assert SqlMetrics.of(MlflowClient("http://127.0.0.1:9")) is None
    client = MlflowClient(f"sqlite:///{mlflow_dir}/mlflow.db")
    store = client._tracking_client.store
    monkeypatch.setattr(store.engine.dialect, "name", "mssql")
    assert SqlMetrics.of(client) is None
    monkeypatch.undo()
    assert SqlMetrics.of(client) is not None
    monkeypatch.setattr(mlflow_sql, "_COLUMNS", (*mlflow_sql._COLUMNS, "dataset"))
    assert SqlMetrics.of(client) is None


def test_without_it_the_backend_goes_through_the_client(
    mlflow_dir: Path, run_info: RunInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SqlMetrics, "of", lambda client: None)
    backend = MLflowBackend()
    identity = backend.open(run_info, None)
    backend.write(scalars(grid(range(1, 11))))
    assert len(rows(mlflow_dir / "mlflow.db", "metrics", identity.run_id)) == 30
