"""Sweeps whose driver is a process of its own, to be interrupted or killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

_SECONDS = 240.0


def start_driver(folder: Path, target: str, config: dict[str, Any], sweep_id: str) -> subprocess.Popen[bytes]:
    """`ray-tracking sweep` on the cluster of the tests; its storage is the folder `runs`."""
    file = folder / "sweep.yaml"
    file.write_text(json.dumps({"name": sweep_id, "storage": str(folder / "runs"), **config}))
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "ray_tracking", "sweep", target, "-c", str(file)]
    return subprocess.Popen(
        [*command, "--env", "testing", "--run-id", sweep_id, "--address", address],
        start_new_session=True,
        env={**os.environ, "RAY_AUTH_MODE": "token"},  # that of the cluster of the tests, in their own HOME
    )


def wait_for(condition: Callable[[], bool], driver: subprocess.Popen[bytes]) -> None:
    """While the driver lives."""
    end = time.monotonic() + _SECONDS
    while not condition():
        assert driver.poll() is None, "the sweep ended before that"
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.2)


@contextmanager
def ended(driver: subprocess.Popen[bytes]) -> Iterator[None]:
    """After the block the driver lives no more."""
    try:
        yield
    finally:
        driver.kill()
        driver.wait()
