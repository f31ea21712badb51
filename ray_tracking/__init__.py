"""Distributed PyTorch training on Ray: one run that survives anything, tracked everywhere.

The names below load what they need when they are first used; importing the package loads nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_tracking.checkpoint import (
        CheckpointManager,
        CheckpointStrategy,
        ModelCheckpoint,
        TrainingCheckpoint,
        create_checkpoint_manager,
        create_model,
    )
    from ray_tracking.config import Config, get_config
    from ray_tracking.errors import RayTrackingError
    from ray_tracking.runtime.context import Run
    from ray_tracking.runtime.result import RunResult
    from ray_tracking.runtime.sweep.result import SweepResult
    from ray_tracking.runtime.trainer import TrainingManager
    from ray_tracking.tracking.base import ExperimentTracker, NoopTracker
    from ray_tracking.tracking.composite import (
        CompositeTracker,
        MLflowTracker,
        TensorBoardTracker,
        WandbTracker,
    )
    from ray_tracking.tracking.factory import create_tracker

__version__ = "0.1.0"

__all__ = [
    "CheckpointManager",
    "CheckpointStrategy",
    "CompositeTracker",
    "Config",
    "ExperimentTracker",
    "MLflowTracker",
    "ModelCheckpoint",
    "NoopTracker",
    "RayTrackingError",
    "Run",
    "RunResult",
    "SweepResult",
    "TensorBoardTracker",
    "TrainingCheckpoint",
    "TrainingManager",
    "WandbTracker",
    "create_checkpoint_manager",
    "create_model",
    "create_tracker",
    "get_config",
]

_HOMES = {
    "CheckpointManager": "checkpoint",
    "CheckpointStrategy": "checkpoint",
    "CompositeTracker": "tracking.composite",
    "Config": "config",
    "ExperimentTracker": "tracking.base",
    "MLflowTracker": "tracking.composite",
    "ModelCheckpoint": "checkpoint",
    "NoopTracker": "tracking.base",
    "RayTrackingError": "errors",
    "Run": "runtime.context",
    "RunResult": "runtime.result",
    "SweepResult": "runtime.sweep.result",
    "TensorBoardTracker": "tracking.composite",
    "TrainingCheckpoint": "checkpoint",
    "TrainingManager": "runtime.trainer",
    "WandbTracker": "tracking.composite",
    "create_checkpoint_manager": "checkpoint",
    "create_model": "checkpoint",
    "create_tracker": "tracking.factory",
    "get_config": "config",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if home.startswith("runtime"):
        from ray_tracking.extras import require

        require("ray", "ray", "torch")
    value = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
