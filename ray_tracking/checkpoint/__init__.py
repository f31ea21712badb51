"""Checkpoints: complete or invisible, verified when loaded, kept by pure rules; no pickle anywhere in them.

In: objects with `state_dict()`, plain state, a Storage. Out: folders of safetensors and JSON, and the state
back again.
May import records, errors, config, storage; nothing of tracking, runs or runtime. Names load lazily, torch
with them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_tracking.checkpoint.inplace import restore
    from ray_tracking.checkpoint.loaded import ModelCheckpoint, TrainingCheckpoint
    from ray_tracking.checkpoint.manager import CheckpointManager, create_checkpoint_manager
    from ray_tracking.checkpoint.manifest import CheckpointInfo
    from ray_tracking.checkpoint.model import create_model
    from ray_tracking.checkpoint.retention import apply_retention
    from ray_tracking.checkpoint.state import Snapshot, capture
    from ray_tracking.checkpoint.store import CheckpointStore
    from ray_tracking.checkpoint.strategy import CheckpointStrategy

__all__ = [
    "CheckpointInfo",
    "CheckpointManager",
    "CheckpointStore",
    "CheckpointStrategy",
    "ModelCheckpoint",
    "Snapshot",
    "TrainingCheckpoint",
    "apply_retention",
    "capture",
    "create_checkpoint_manager",
    "create_model",
    "restore",
]

_HOMES = {
    "CheckpointInfo": "manifest",
    "CheckpointManager": "manager",
    "CheckpointStore": "store",
    "CheckpointStrategy": "strategy",
    "ModelCheckpoint": "loaded",
    "Snapshot": "state",
    "TrainingCheckpoint": "loaded",
    "apply_retention": "retention",
    "capture": "state",
    "create_checkpoint_manager": "manager",
    "create_model": "model",
    "restore": "inplace",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)
