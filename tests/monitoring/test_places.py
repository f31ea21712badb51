"""Whether a save may be under way in a run's directory."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ray_tracking.monitoring.places import Activity, run_place
from ray_tracking.runs.lease import acquire
from ray_tracking.runs.record import RunRecord, Status
from ray_tracking.runs.store import RunStore
from ray_tracking.storage import Storage


@pytest.mark.parametrize("status", [Status.FAILED, Status.RUNNING])
def test_a_run_whose_lease_is_held_is_alive_whatever_its_record_says(tmp_path: Path, status: Status) -> None:
    """A driver that has begun to resume it has not written run.json yet, or waits for its cluster."""
    runs = RunStore(Storage.open(tmp_path))
    old = time.time() - 3600
    record = RunRecord("r", "n", old).begin_attempt(old, 1)
    runs.save(record if status is Status.RUNNING else record.finish(old, status, "it failed"))
    silent = Activity.UNKNOWN if status is Status.RUNNING else Activity.ENDED
    assert run_place(runs, "r", time.time()).activity is silent
    lease = acquire(runs.directory("r"))
    assert run_place(runs, "r", time.time()).activity is Activity.RUNNING
    lease.release()
    assert run_place(runs, "r", time.time()).activity is silent
