"""What a config asks for: a tracker for those who log, backends for the tracker process.

In: the section `experiment_tracking`. Out: an ExperimentTracker; backends, not opened yet, that import their
client when they are; and which of them can't be had here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from ray_tracking.config import ExperimentTrackingConfig
from ray_tracking.tracking.backends.base import Backend
from ray_tracking.tracking.backends.mlflow import MLflowBackend
from ray_tracking.tracking.backends.tensorboard import TensorBoardBackend
from ray_tracking.tracking.backends.wandb import WandbBackend
from ray_tracking.tracking.base import ExperimentTracker

_BACKENDS: dict[str, Callable[..., Backend]] = {
    "tensorboard": TensorBoardBackend,
    "wandb": WandbBackend,
    "mlflow": MLflowBackend,
}
BACKEND_NAMES = tuple(_BACKENDS)
_PACKAGES: Mapping[str, tuple[str, ...]] = {"tensorboard": ("tensorboard", "google_crc32c")}
"""What a backend imports, by its name; the others that of their own name."""


@dataclass(frozen=True, slots=True)
class UnavailableBackend:
    """An enabled backend whose package is not installed; `hint` is the command that installs it."""

    name: str
    reason: str
    hint: str


def create_tracker(
    config: ExperimentTrackingConfig | Mapping[str, Any] | None = None, *, storage: str | None = None
) -> ExperimentTracker:
    """A tracker for a plain script, from `config["experiment_tracking"]` or the like.

    `storage` is where runs lie (default: RAY_TRACKING_STORAGE, else ./runs). Raises ConfigError for a section that is
    not valid. Inside a training function use `run.tracker`.
    """
    from ray_tracking.tracking.composite import CompositeTracker

    return CompositeTracker(config, storage=storage)


def create_backends(config: Any) -> list[Backend | UnavailableBackend]:
    """The enabled backends of a validated `experiment_tracking` section (a model, or a mapping of the same shape)."""
    made: list[Backend | UnavailableBackend] = []
    for name, make in _BACKENDS.items():
        options = _options(config, name)
        if not options.pop("enabled", False):
            continue
        missing = next((package for package in _PACKAGES.get(name, (name,)) if not _is_installed(package)), None)
        if missing is not None:
            reason = f"The package {missing} is not installed."
            made.append(UnavailableBackend(name, reason, f'pip install "ray-tracking[{name}]"'))
        else:
            made.append(make(**options))
    return made


def _is_installed(package: str) -> bool:
    spec = find_spec(package)
    return spec is not None and spec.origin is not None  # no origin: just a folder, such as W&B's own ./wandb


def _options(config: Any, name: str) -> dict[str, Any]:
    section = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    if section is None:
        return {}
    if isinstance(section, Mapping):
        return dict(section)
    return {field: getattr(section, field) for field in type(section).model_fields}
