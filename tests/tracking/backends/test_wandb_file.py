"""A W&B file that is no longer written is noticed, and one that is written is not read for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_tracking.errors import BackendError
from ray_tracking.tracking.backends import wandb_file
from ray_tracking.tracking.backends.wandb_file import FileWatch, check_writable


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (folder := tmp_path / "offline-run-20260101_000000-r1").mkdir()
    (path := folder / "run-r1.wandb").write_bytes(b"")
    return path


def test_watch(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, reads = [-1], []

    def held_offset(folder: str, run_id: str) -> int:
        reads.append((folder, run_id))
        return held[0]

    monkeypatch.setattr(wandb_file, "held_offset", held_offset)
    watch = FileWatch(str(file.parents[1]), "r1")
    for sent in (10, 20, 30):
        file.write_bytes(bytes(sent))
        assert watch.is_written(sent)
    assert reads == []
    held[0] = 30
    assert watch.is_written(30)  # it has not grown, and holds what was sent
    assert watch.is_written(30)
    assert len(reads) == 1
    assert watch.is_written(40)  # sent just now: there was no time yet
    assert not watch.is_written(50)  # what was sent the last time is not there
    held[0] = 50
    assert watch.is_written(50)


def test_check_writable(tmp_path: Path) -> None:
    check_writable(str(tmp_path / "new" / "wandb"))
    assert list((tmp_path / "new" / "wandb").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(BackendError, match="can't be written"):
        check_writable(str(tmp_path / "file" / "wandb"))
