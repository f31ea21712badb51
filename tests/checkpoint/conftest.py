from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_tracking.checkpoint.state import Snapshot, capture
from ray_tracking.checkpoint.store import CheckpointStore
from ray_tracking.storage import Storage

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _keep_random_states() -> Any:
    """Tests set the global random states: put them back, so that no test depends on another."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(Storage.open(tmp_path / "store"))


@pytest.fixture
def save() -> Callable[..., str]:
    """save(store, step, **capture arguments): one complete checkpoint of a tiny state, its folder."""

    def write(store: CheckpointStore, step: int, **options: Any) -> str:
        world_size = options.pop("world_size", 1)
        folder = options.pop("folder", None) or store.new_folder(step)
        for rank in range(world_size):
            store.write_snapshot(folder, snapshot(step, rank=rank, world_size=world_size, **options))
        return folder

    return write


def open_files(folder: Path) -> list[str]:
    """Those below it that this process has open. Others come and go: threads of other tests have theirs."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that listed them
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return [path for path in found if path.startswith(f"{folder}/")]


def snapshot(step: int, **options: Any) -> Snapshot:
    rank = options.get("rank", 0)
    objects = {
        "model": {"weight": torch.full((4, 3), float(step)), "bias": torch.arange(3.0)},
        "optimizer": {"state": {0: {"exp_avg": torch.full((4, 3), step / 7)}}, "lr": 0.1},
        "loader": {"position": step * 10 + rank},
    }
    return capture(objects, step=step, **options)
