"""The hub's memory, open files and threads stay flat however many trials it has tracked."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

TRIALS, WARM_UP = 64, 16
BYTES_PER_TRIAL = 100_000


@pytest.mark.slow
def test_what_a_trial_leaves_in_the_hub_is_small(tmp_path):
    command = [sys.executable, "-m", "tests.runtime.sweep.hub_memory", str(tmp_path), str(TRIALS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(figures) == TRIALS
    warm, last = figures[WARM_UP - 1], figures[-1]
    grown = (last["rss"] - warm["rss"]) / (TRIALS - WARM_UP)
    for each in figures[:: TRIALS // 8]:
        print({**each, "rss": f"{each['rss'] / 1e6:.0f} MB"})
    print(f"{grown / 1000:.0f} kB per trial after {WARM_UP}")
    assert grown < BYTES_PER_TRIAL
    assert last["files"] <= warm["files"] + 2
    assert last["threads"] <= warm["threads"] + 1
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) >= TRIALS


@pytest.mark.slow
def test_many_short_trials_leave_the_hub_flat_and_nothing_alive(tmp_path):
    command = [sys.executable, "-m", "tests.runtime.sweep.short_trials", str(tmp_path), "128"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]
    *figures, last = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    print("\n".join(str({**each, "rss": f"{each['rss'] / 1e6:.0f} MB"}) for each in figures))
    assert last == {"left": []}
    half = next(each for each in figures if each["trials"] >= 48)
    for each in figures:
        if each["trials"] > half["trials"]:
            assert each["rss"] < 1.1 * half["rss"]  # what grows until then is malloc's, one arena for each thread
            assert each["files"] <= half["files"] + 8
            assert each["threads"] <= half["threads"] + 8
