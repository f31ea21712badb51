"""Homes without a login, and an MLflow database that is made once: its creation takes seconds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ray_tracking.tracking.backends.base import RunInfo


@pytest.fixture(autouse=True)
def _bare_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    for variable in ("WANDB_API_KEY", "WANDB_MODE", "NETRC", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables and no runs."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def local_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


@pytest.fixture
def mlflow_dir(local_dir: Path, empty_mlflow: Path) -> Path:
    shutil.copy(empty_mlflow, local_dir / "mlflow.db")
    return local_dir


@pytest.fixture
def run_info(local_dir: Path) -> RunInfo:
    (local_dir / "r1" / "artifacts").mkdir(parents=True)
    return RunInfo(
        "r1", "first run", {"width": 8}, {"team": "vision"}, str(local_dir), str(local_dir / "r1" / "artifacts")
    )
