"""The whole command on the example: real kills on a real cluster, of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def chaos(storage: Path | None, *words: str, seconds: float) -> dict[str, Any]:
    """Skips what can't be struck here, with the command's own reason."""
    place = () if storage is None else ("--storage", str(storage))
    command = [sys.executable, "-m", "ray_tracking.testing.chaos", "--json", *place, *words]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=seconds)
    if done.returncode == 3:
        pytest.skip(done.stderr)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    evidence: dict[str, Any] = json.loads(done.stdout)
    return evidence


def check(evidence: dict[str, Any], times: int) -> None:
    assert evidence["equal"]
    assert evidence["faults"] == {"wanted": times, "while_training": times}
    compared = {each["what"]: each for each in evidence["compared"]}
    own = {f"{name} of rank {rank}" for name in ("loader", "rng") for rank in range(2)}
    assert {*own, "model", "optimizer", "scheduler", "journal", "tensorboard", "mlflow", "wandb"} == set(compared)
    assert all(each["compared"] > 0 and each["equal"] for each in compared.values())
    assert all(each["complete"] > 0 for each in evidence["recoveries"] if each["step"] > 40)
    assert evidence["ignored"] == ["train/tokens_per_second"]


@pytest.mark.ray
def test_worker_tracker_and_driver_killed_and_nothing_shows(tmp_path: Path) -> None:
    settings = "--set", "params.epochs=4", "--set", "failure.lease_secs=10"
    evidence = chaos(tmp_path, "--kinds", "worker,tracker,driver", "--times", "3", *settings, seconds=1500)
    check(evidence, 3)
    assert sorted(each["part"] for each in evidence["recoveries"]) == ["driver", "tracker", "worker"]
    assert evidence["attempts"] == 3
    assert all(each["restored"] is not None for each in evidence["recoveries"] if each["part"] != "tracker")


@pytest.mark.ray
@pytest.mark.slow
def test_ten_kills(tmp_path: Path) -> None:
    evidence = chaos(tmp_path, seconds=1500)
    check(evidence, 10)
    assert {each["part"] for each in evidence["recoveries"]} == {"worker", "tracker", "driver", "writer"}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kinds", "parts"),
    [
        ("node,head", {"node", "head"}),
        ("backend", {"tensorboard", "mlflow", "wandb"}),
        ("disk", {"disk"}),
    ],
)
def test_what_is_around_a_run_is_killed_or_taken_away(tmp_path: Path, kinds: str, parts: set[str]) -> None:
    storage = tmp_path if "disk" not in parts else None
    evidence = chaos(storage, "--kinds", kinds, "--times", str(len(parts)), seconds=900)
    check(evidence, len(parts))
    assert {each["part"] for each in evidence["recoveries"]} == parts
    for each in evidence["recoveries"]:
        assert (each["restored"] is not None) == (each["part"] in ("node", "head"))
        assert (each["noticed"] is not None) == (each["part"] not in ("node", "head"))
