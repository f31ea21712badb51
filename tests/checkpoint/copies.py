"""Parts of checkpoints written to a storage and copied on their way, as the writer process does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ray_tracking.checkpoint.keys import Keyring
from ray_tracking.checkpoint.manifest import CheckpointInfo
from ray_tracking.checkpoint.nearby import Nearby
from ray_tracking.checkpoint.part import PartWriter
from ray_tracking.checkpoint.reader import OpenCheckpoint
from ray_tracking.checkpoint.sealing import Sealing
from ray_tracking.checkpoint.store import CheckpointStore

from .conftest import snapshot


def write_part(
    store: CheckpointStore,
    nearby: Nearby,
    folder: str,
    step: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    sealing: Sealing | None = None,
    commit: bool = True,
) -> None:
    taken = snapshot(step, rank=rank, world_size=world_size)
    size = sum(len(view) for view in taken.files.values())
    part = PartWriter(nearby.copying(store.storage, folder, rank, size), folder, sealing or Sealing())
    writing = part.write(taken.manifest, taken.files)
    while True:
        try:
            next(writing)
        except StopIteration as end:
            if commit:
                part.commit(end.value)
            return


def save(store: CheckpointStore, nearby: Nearby, step: int, *, world_size: int = 1, **options: Any) -> CheckpointInfo:
    """A complete checkpoint in the store's own folder, all of it copied."""
    folder = store.folder_of(step)
    for rank in range(world_size):
        write_part(store, nearby, folder, step, rank=rank, world_size=world_size, **options)
    info = store.inspect(folder).info
    assert info is not None
    return info


def restored(
    store: CheckpointStore, info: CheckpointInfo, nearby: Nearby | None, keyring: Keyring | None = None
) -> tuple[float, int]:
    """The value that all weights have, the step; and how many bytes came from memory. All ranks' states are read."""
    copies = None if nearby is None else nearby.storage
    with OpenCheckpoint(store.storage, info, keyring, copies) as opened:
        for rank in range(info.world_size):
            states = opened.states(rank)
            weight = states["model"]["weight"]
            assert torch.equal(weight, torch.full((4, 3), float(weight[0, 0])))
            assert states["loader"] == {"position": int(weight[0, 0]) * 10 + rank}
        return float(weight[0, 0]), opened.from_nearby


def copied(nearby: Nearby) -> list[str]:
    """The folders of checkpoints that have a copy."""
    root = Path(nearby.storage.root)
    found = {path.parent for path in root.rglob("*") if path.is_file()} - {root}
    return sorted(str(path.relative_to(root)) for path in found)
