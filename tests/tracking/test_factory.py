"""Which backends a config makes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest
from pydantic import BaseModel

from ray_tracking.tracking.backends.mlflow import MLflowBackend
from ray_tracking.tracking.backends.tensorboard import TensorBoardBackend
from ray_tracking.tracking.backends.wandb import WandbBackend
from ray_tracking.tracking.factory import UnavailableBackend, create_backends


class Section(BaseModel):
    enabled: bool = True
    log_dir: str | None = None


def test_enabled_ones_from_a_mapping() -> None:
    made = create_backends(
        {
            "tensorboard": {"enabled": True, "log_dir": None, "update_freq": 1, "flush_secs": 10},
            "wandb": {"enabled": True, "project": None, "entity": None, "tags": [], "mode": "offline"},
            "mlflow": {"enabled": True, "tracking_uri": None, "experiment_name": None, "log_models": False},
        }
    )
    assert [type(backend) for backend in made] == [TensorBoardBackend, WandbBackend, MLflowBackend]


def test_enabled_ones_from_a_model() -> None:
    config = SimpleNamespace(tensorboard=Section(), wandb=None, mlflow=Section(enabled=False))
    assert [type(backend) for backend in create_backends(config)] == [TensorBoardBackend]


def test_one_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr("ray_tracking.tracking.factory.find_spec", lambda name: None if name == "wandb" else real(name))
    made = create_backends({"tensorboard": {"enabled": True}, "wandb": {"enabled": True, "mode": "offline"}})
    assert made[1] == UnavailableBackend(
        "wandb", "The package wandb is not installed.", 'pip install "ray-tracking[wandb]"'
    )


def test_making_backends_imports_no_client() -> None:
    code = (
        "import sys; from ray_tracking.tracking.factory import create_backends;"
        "create_backends({name: {'enabled': True} for name in ('tensorboard', 'wandb', 'mlflow')});"
        "print([name for name in ('tensorboard', 'wandb', 'mlflow', 'torch', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
