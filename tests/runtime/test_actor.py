"""The tracker as an actor: killed it joins the run again; a refusal keeps its type on its way through Ray."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from ray_tracking.errors import LeaseHeldError, LeaseLostError, RefusedError
from ray_tracking.journal.reader import JournalReader
from ray_tracking.runs.lease import acquire
from ray_tracking.runs.lease_files import process_at, seats
from ray_tracking.runs.lease_rules import Seat
from ray_tracking.runs.record import RunRecord, Status
from ray_tracking.runs.store import RunStore
from ray_tracking.runtime.actor import ActorTransport, start_actor
from ray_tracking.storage import Storage
from ray_tracking.tracking.spec import TrackerSpec
from ray_tracking.tracking.transport import TransportError, pack

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def batch(*steps: int) -> bytes:
    return pack([(step, "scalar", step, 1.0, {"loss": 0.5}) for step in steps])


def spec(folder: Path, lease: str | None = None) -> TrackerSpec:
    return TrackerSpec("r", "r", str(folder), str(folder), tracking={"enabled": False}, lease=lease)


def answered(call: Callable[[], Any]) -> Any:
    """Its answer, once the actor has been started again: Ray may say before that it is not there."""
    end = time.monotonic() + 240
    while True:
        try:
            return call()
        except TransportError:
            assert time.monotonic() < end


def test_one_that_was_killed_joins_again_at_once_and_one_that_was_fenced_says_so(tmp_path: Path) -> None:
    run = Storage.open(tmp_path).child("r")
    driver = acquire(run)
    actor = start_actor(spec(tmp_path, driver.ticket))
    try:
        transport = ActorTransport(actor)
        assert transport.append(0, transport.call("begin_attempt", 1), batch(1, 2)) == 2
        process = process_at(run, Seat(1, 1))
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        assert answered(lambda: transport.append(0, 1, batch(1, 2, 3))) == 3
        assert set(seats(run)) == {Seat(1), Seat(1, 2)}, "its lease of 30 s was not waited for: it was known to be dead"
        transport.call("confirm")

        run.write_bytes(Seat(2).name, run.read_bytes(Seat(1).name))  # another driver has taken over
        second = process_at(run, Seat(1, 2))
        assert second is not None
        os.kill(second.pid, signal.SIGKILL)
        for call in (lambda: transport.append(0, 1, batch(4)), lambda: transport.call("confirm")):
            with pytest.raises(LeaseLostError) as lost:
                answered(call)
            assert (lost.value.run, lost.value.epoch) == ("r", 2)
    finally:
        ray.kill(actor)
    steps = [row.step for row in JournalReader(run).read()]
    assert steps == [1, 2, 3]


def test_what_it_is_refused_is_told_at_its_start(tmp_path: Path) -> None:
    runs = RunStore(Storage.open(tmp_path))
    driver = acquire(runs.directory("r"))
    with pytest.raises(LeaseHeldError, match=f"pid {os.getpid()} on"):
        start_actor(spec(tmp_path))
    driver.release()
    with pytest.raises(LeaseLostError):
        start_actor(spec(tmp_path, driver.ticket))
    record = RunRecord("r", "r", 1.0)
    runs.save(replace(record, status=Status.COMPLETED))
    with pytest.raises(RefusedError, match="is completed"):
        start_actor(spec(tmp_path))
