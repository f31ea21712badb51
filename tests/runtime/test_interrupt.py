"""A person's Ctrl-C, a scheduler's SIGTERM: the run ends in order, is called aborted, and nothing is left running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ray_tracking.journal.reader import JournalReader
from ray_tracking.runs.store import RunStore
from ray_tracking.storage import Storage

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_aborts_the_run_in_order(tmp_path: Path, number: signal.Signals) -> None:
    marker = tmp_path / "begun"
    command = [
        *(sys.executable, "-m", "ray_tracking", "train", str(Path(__file__).with_name("functions.py")) + ":forever"),
        *("--env", "testing", "--run-id", "r", "--set", f"params.marker={marker}"),
        *("--set", "experiment_tracking.tensorboard.enabled=true"),
    ]
    environment = {**os.environ, "RAY_TRACKING_STORAGE": str(tmp_path / "runs")}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 240
        while not marker.exists():
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < end, "training did not begin"
            time.sleep(0.1)
        process.send_signal(number)
        _, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    store = RunStore(Storage.open(tmp_path / "runs"))
    record = store.load("r")
    assert record.status == "aborted"
    assert record.attempts[0].ended is not None
    steps = JournalReader(store.directory("r")).effective().column("step").to_pylist()
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 15
    cursor = json.loads((tmp_path / "runs" / "r" / "cursors" / "tensorboard.json").read_text())
    assert cursor["state"] == "complete"
