"""Importing the package is light, and every public name is there."""

from __future__ import annotations

import subprocess
import sys

import pytest

import ray_tracking

HEAVY = ("torch", "ray", "pyarrow", "pydantic", "mlflow", "wandb", "tensorboard", "numpy", "structlog", "yaml")


def loaded_after(code: str) -> set[str]:
    probe = f"{code}\nimport sys\nprint(*(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_probe_sees_what_is_loaded() -> None:
    assert loaded_after("import yaml") == {"yaml"}


def test_importing_loads_nothing_heavy() -> None:
    assert loaded_after("import ray_tracking") == set()
    assert loaded_after("import ray_tracking; dir(ray_tracking); ray_tracking.__version__") == set()


def test_tracking_in_a_plain_script_needs_no_torch_and_no_ray() -> None:
    code = "from ray_tracking import create_tracker, get_config; create_tracker(get_config()['experiment_tracking'])"
    assert loaded_after(code) & {"torch", "ray", "mlflow", "wandb", "tensorboard"} == set()


@pytest.mark.parametrize("name", ray_tracking.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(ray_tracking, name).__name__ == name
    assert name in dir(ray_tracking)


def test_other_names_do_not() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        ray_tracking.no_such_name  # noqa: B018
    assert set(ray_tracking._HOMES) == set(ray_tracking.__all__)
