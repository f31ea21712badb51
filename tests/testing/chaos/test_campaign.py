"""Campaigns against a small program in the place of training: what is counted as a hit, and what is no proof."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from ray_tracking.errors import RunFailedError
from ray_tracking.runs.store import RunStore
from ray_tracking.storage import Storage
from ray_tracking.testing.chaos.campaign import Campaign
from ray_tracking.testing.chaos.comparing import last_step, rows
from ray_tracking.testing.chaos.evidence import recoveries
from ray_tracking.testing.chaos.plan import Part, Strike
from ray_tracking.testing.chaos.processes import Driver
from tests.testing.chaos.training_stub import SAVE_STEPS

STEPS = 60


def campaign(folder: Path, how: str = "well", patience: float = 60.0) -> Campaign:
    def start(run_id: str, output: Path) -> Driver:
        stub = [sys.executable, "-m", "tests.testing.chaos.training_stub", str(folder), run_id, str(STEPS), how]
        return Driver(stub, os.environ, output)

    return Campaign(start, Storage.open(folder), folder, lambda _: None, patience=patience)


def test_the_driver_is_killed_and_started_again_until_the_run_is_completed(tmp_path: Path) -> None:
    strikes = [Strike(1, Part.DRIVER, 14, 0.0, 0.0), Strike(2, Part.DRIVER, 35, 3.0, 0.0)]
    hits = campaign(tmp_path).run("r", strikes)
    runs = RunStore(Storage.open(tmp_path))
    record = runs.load("r")
    assert record.status == "completed"
    assert [hit.strike for hit in hits] == strikes
    assert [hit.attempt for hit in hits] == [1, 2]
    assert last_step(runs.directory("r")) == STEPS
    found = recoveries(hits, rows(runs.directory("r")), record.attempts)
    for each, strike in zip(found, strikes, strict=True):
        assert each.while_training
        assert each.step >= strike.step
        assert each.restored == each.step // SAVE_STEPS * SAVE_STEPS
        assert each.repeated == each.step - each.restored
    # No step is missing from the attempts put together.
    assert {row.step for row in rows(runs.directory("r")) if row.key} == set(range(1, STEPS + 1))


def test_a_worker_that_is_killed_needs_a_new_attempt_before_the_next_strike(tmp_path: Path) -> None:
    """The stub does not start its worker again: the second strike never comes, and is not counted."""
    strikes = [Strike(1, Part.WORKER, 5, 0.0, 0.9), Strike(2, Part.WORKER, 6, 0.0, 0.9)]
    hits = campaign(tmp_path).run("r", strikes)
    assert [hit.strike.number for hit in hits] == [1]


def test_a_part_that_is_not_there_is_no_hit(tmp_path: Path) -> None:
    assert campaign(tmp_path).run("r", [Strike(1, Part.TRACKER, 5, 0.0, 0.0)]) == []


def test_a_run_that_fails_by_itself_is_shown_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(RunFailedError, match=r"ended by itself with status 1[^|]*no luck at all"):
        campaign(tmp_path, "badly").run("r", [Strike(1, Part.WORKER, 5, 0.0, 0.0)])


def test_a_run_that_stands_still_is_ended(tmp_path: Path) -> None:
    with pytest.raises(RunFailedError, match=r"showed nothing new for 3 s[^|]*it printed nothing"):
        campaign(tmp_path, "silently", patience=3.0).run("r")
