"""The versions that a run's results may depend on."""

from __future__ import annotations

import importlib.metadata
import platform
from functools import cache

_PACKAGES = ("ray-tracking", "ray", "torch", "numpy", "pyarrow", "tensorboard", "wandb", "mlflow")


def installed_versions() -> dict[str, str]:
    """By package, Python first; those that are not installed are left out."""
    return dict(_found())


@cache  # it reads a file per package, and the hub of a sweep asks for every trial
def _found() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
