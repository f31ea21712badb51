"""Where a training function runs: what `work` must know of its surroundings, and what it tells them.

In Ray Train's worker groups `InRayTrain`; a sweep's trial of one worker brings its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, Protocol

import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.v2._internal.execution.context import get_train_context as get_internal_train_context

from ray_tracking.checkpoint.manifest import Manifest


class Place(Protocol):
    """One rank's place. `register` is told of each checkpoint as it is begun, on all ranks, on the training thread."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def local_rank(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def folder(self, attempt: int) -> str:
        """The folder of the run in which the attempt's checkpoints lie: one that no other attempt has used."""
        ...

    def register(self, metrics: Mapping[str, Any], folder: str, written: Future[Manifest]) -> None: ...

    def is_preempted(self) -> bool:
        """Whether the machine is being taken away. Asked on rank 0 alone."""
        ...


class InRayTrain:
    """A worker of Ray Train: each checkpoint is reported to it."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.local_rank: int = context.get_local_rank()
        self.device: torch.device = ray.train.torch.get_device()
        self._storage: Any = context.get_storage()

    def folder(self, attempt: int) -> str:
        return str(os.path.basename(self._storage.experiment_fs_path))

    def register(self, metrics: Mapping[str, Any], folder: str, written: Future[Manifest]) -> None:
        storage = self._storage
        ray.train.report(
            dict(metrics),
            checkpoint=Checkpoint(storage.experiment_fs_path, storage.storage_filesystem),
            checkpoint_dir_name=folder,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=False,
            checkpoint_upload_fn=lambda _checkpoint, name: _when_written(written, storage, name),
        )

    def is_preempted(self) -> bool:
        return get_internal_train_context().preemption_context.preemption_info is not None

    def deadline(self) -> float | None:
        """When, in Unix seconds, the machine is taken away, if that is known."""
        info = get_internal_train_context().preemption_context.preemption_info
        return None if info is None or info.deadline_ms is None else info.deadline_ms / 1000


def _when_written(written: Future[Manifest], storage: Any, folder: str) -> Checkpoint:
    """On Ray's upload thread: the checkpoint to register, once it is there (a failure is said where it is settled)."""
    written.exception()
    return Checkpoint(f"{storage.experiment_fs_path}/{folder}", storage.storage_filesystem)
