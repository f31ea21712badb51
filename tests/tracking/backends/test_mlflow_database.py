"""A process that is killed while it makes MLflow's database leaves none, and the next one makes it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import pytest

from ray_tracking.tracking.backends.mlflow_database import create_database

_MAKE = """
import sys
from ray_tracking.tracking.backends.mlflow_database import create_database
create_database(sys.argv[1], sys.argv[1] + "-artifacts")
"""


def experiments(path: Path) -> list[str]:
    from mlflow import MlflowClient

    return [found.name for found in MlflowClient(f"sqlite:///{path}").search_experiments()]


def test_killed_while_it_is_made(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    waits = "import os, time; os.link = lambda *_: time.sleep(600)\n"  # at the latest before it would be there
    process = subprocess.Popen([sys.executable, "-c", waits + _MAKE, str(path)])
    end = time.monotonic() + 120
    while not any(name.endswith(".new") for name in os.listdir(tmp_path)):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not path.exists()
    create_database(str(path), str(tmp_path / "artifacts"))
    assert experiments(path) == ["Default"]


def test_several_at_once_and_one_that_is_there(tmp_path: Path) -> None:
    """Threads of this process, and another process."""
    path = tmp_path / "mlflow.db"
    process = subprocess.Popen([sys.executable, "-c", _MAKE, str(path)])
    threads = [Thread(target=create_database, args=(str(path), str(tmp_path / "artifacts"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert process.wait() == 0
    assert [name for name in os.listdir(tmp_path) if name.startswith("mlflow")] == ["mlflow.db"]
    assert experiments(path) == ["Default"]
    before = path.stat()
    create_database(str(path), str(tmp_path / "artifacts"))
    assert path.stat().st_ino == before.st_ino


def test_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: str) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "mlflow.db"
    create_database(str(path), str(tmp_path / "artifacts"))
    assert experiments(path) == ["Default"]
    assert [name for name in os.listdir(tmp_path) if name.startswith("mlflow")] == ["mlflow.db"]
