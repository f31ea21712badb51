"""Every backend passes the same test, read back by its own client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest

from ray_tracking.testing import InMemoryBackend, Point, check_backend
from ray_tracking.tracking.backends.base import Backend, BackendIdentity
from ray_tracking.tracking.backends.mlflow import MLflowBackend
from ray_tracking.tracking.backends.tensorboard import TensorBoardBackend, shown_tag
from ray_tracking.tracking.backends.wandb import WandbBackend, shown_key
from tests.readback import mlflow_points, tensorboard_points, wandb_points


def as_single(value: float) -> float:
    return float(numpy.float32(value))


def read_tensorboard(backend: Backend, identity: BackendIdentity) -> list[Point]:
    points = tensorboard_points(identity.location)
    return [("" if key == shown_tag("") else key, step, value) for key, step, value in points]


def test_tensorboard(local_dir: Path) -> None:
    check_backend(
        TensorBoardBackend,
        read_tensorboard,
        local_dir=str(local_dir),
        rounded=as_single,
    )


def test_tensorboard_gathering_steps(local_dir: Path) -> None:
    check_backend(
        lambda: TensorBoardBackend(update_freq=7, flush_secs=0),
        read_tensorboard,
        local_dir=str(local_dir),
        rounded=as_single,
    )


def test_wandb(local_dir: Path) -> None:
    original = {shown_key(key): key for key in ("", "_step", "loss@step", "x" * 300)}

    def read(backend: Backend, identity: BackendIdentity) -> list[Point]:
        points = wandb_points(identity.location, identity.run_id)
        return [(original.get(key, key), step, value) for key, step, value in points]

    check_backend(WandbBackend, read, local_dir=str(local_dir))


def test_mlflow(mlflow_dir: Path) -> None:
    check_backend(
        MLflowBackend,
        lambda backend, identity: mlflow_points(identity.location, identity.run_id),
        local_dir=str(mlflow_dir),
    )


def test_memory(local_dir: Path) -> None:
    kept: list[InMemoryBackend] = []

    def make() -> InMemoryBackend:
        backend = InMemoryBackend()
        if kept:
            backend.records, backend._held = kept[-1].records, kept[-1]._held
        kept.append(backend)
        return backend

    check_backend(make, lambda backend, identity: kept[-1].points, local_dir=str(local_dir))


@pytest.mark.parametrize("lost", [0, 700])
def test_a_backend_that_loses_a_point_fails(local_dir: Path, lost: int) -> None:
    backend = InMemoryBackend()

    def read(_: Backend, __: BackendIdentity) -> list[Point]:
        points: list[Any] = list(backend.points)
        del points[lost]
        return points

    with pytest.raises(AssertionError, match="1 points are missing"):
        check_backend(lambda: backend, read, local_dir=str(local_dir))
