"""The versions that a run's results may depend on."""

from __future__ import annotations

import importlib.metadata
import platform

_PACKAGES = ("ray-tracking", "ray", "torch", "numpy", "pyarrow", "tensorboard", "wandb", "mlflow")


def installed_versions() -> dict[str, str]:
    """By package, Python first; those that are not installed are left out."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
