"""How far a backend has been filled, on storage."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_tracking.storage import Storage
from ray_tracking.tracking.cursor import BackendState, Cursor


def test_round_trip_and_new(tmp_path: Path) -> None:
    run = Storage.open(tmp_path)
    cursor = Cursor("mlflow", 7, 6, 1, BackendState.FAILING, "down", "id", "uri", ["image"])
    cursor.save(run)
    Cursor("wandb").save(run)
    assert Cursor.load(run, "mlflow") == cursor
    assert Cursor.load(run, "tensorboard") == Cursor("tensorboard")
    assert Cursor.load_all(run) == [cursor, Cursor("wandb")]


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b'{"offset": 3}',
        b'{"state": "glowing"}',
        b'{"state": "ok", "offset": -1}',
        b'{"state": "ok", "offset": "3"}',
        b'{"state": "ok", "offset": 3.5}',
        b'{"state": "ok", "delivered": null}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_one_is_a_new_one_and_said(tmp_path: Path, damage: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    run = Storage.open(tmp_path)
    run.write_bytes("cursors/mlflow.json", damage)
    assert Cursor.load(run, "mlflow") == Cursor("mlflow")
    assert "cursor damaged" in capsys.readouterr().err


def test_fields_of_a_newer_version_are_passed_over(tmp_path: Path) -> None:
    run = Storage.open(tmp_path)
    run.write_bytes("cursors/m.json", b'{"state": "ok", "offset": 3, "lag": 9}')
    assert Cursor.load(run, "m") == Cursor("m", offset=3, state=BackendState.OK)
