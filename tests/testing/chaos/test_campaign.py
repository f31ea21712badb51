"""Campaigns against a small program in the place of training: what is counted as a hit, and what is no proof."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from ray_tracking.errors import RunFailedError
from ray_tracking.runs.store import RunStore
from ray_tracking.storage import Storage
from ray_tracking.testing.chaos.campaign import Campaign
from ray_tracking.testing.chaos.comparing import last_step, rows
from ray_tracking.testing.chaos.evidence import recoveries
from ray_tracking.testing.chaos.outages import Outage
from ray_tracking.testing.chaos.plan import Part, Strike
from ray_tracking.testing.chaos.processes import Launched, Process
from ray_tracking.tracking.cursor import BackendState, Cursor
from tests.testing.chaos.training_stub import SAVE_STEPS

STEPS = 60
HELD = f"held:{STEPS}"
"""The run can't be over before a strike, however late it comes: `let_go`."""
AWAY = 0.5


class StubScene:
    """The stub in the place of training; `outages` are what can be taken away from it."""

    cluster = None

    def __init__(self, folder: Path, how: str, outages: Mapping[Part, Outage] | None = None) -> None:
        self.folder = folder
        self.how = how
        self.outages = dict(outages or {})
        self.synced: list[str] = []

    def start(self, run_id: str, output: Path, *, resume: bool) -> Launched:
        words = ["-m", "tests.testing.chaos.training_stub", str(self.folder), run_id, str(STEPS), self.how]
        return Launched([sys.executable, *words], os.environ, output)

    def sync(self, run_id: str, output: Path) -> Launched:
        self.synced.append(run_id)
        return Launched([sys.executable, "-c", "raise SystemExit(4)"], os.environ, output)

    def find(self, driver: Launched, part: Part) -> list[Process]:
        return driver.find(part)

    def outage(self, part: Part, directory: Storage, driver: Launched) -> Outage | None:
        return self.outages.get(part)


def campaign(
    folder: Path,
    how: str = "well",
    patience: float = 60.0,
    away: float = AWAY,
    say: Callable[[str], None] = lambda _: None,
    **outages: Outage,
) -> Campaign:
    scene = StubScene(folder, how, {Part(name): outage for name, outage in outages.items()})
    return Campaign(scene, Storage.open(folder), folder, say, patience=patience, away=away)


def let_go(folder: Path, step: int = STEPS) -> None:
    (folder / f"go-{step}").touch()


def going_on_after(fault: int, folder: Path) -> Callable[[str], None]:
    """Hears what a campaign says: the stub, which is held, goes on once that fault has hit."""
    return lambda line: let_go(folder) if line.startswith(f"fault {fault}:") else None


def test_the_driver_is_killed_and_started_again_until_the_run_is_completed(tmp_path: Path) -> None:
    strikes = [Strike(1, Part.DRIVER, 14, 0.0, 0.0), Strike(2, Part.DRIVER, 35, 3.0, 0.0)]
    hits = campaign(tmp_path, HELD, say=going_on_after(2, tmp_path)).run("r", strikes)
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
    hits = campaign(tmp_path, HELD, say=going_on_after(1, tmp_path)).run("r", strikes)
    assert [hit.strike.number for hit in hits] == [1]


def test_a_part_that_is_not_there_is_no_hit(tmp_path: Path) -> None:
    assert campaign(tmp_path).run("r", [Strike(1, Part.TRACKER, 5, 0.0, 0.0)]) == []


def test_a_command_that_is_killed_when_its_run_is_completed_is_not_started_again(tmp_path: Path) -> None:
    (hit,) = campaign(tmp_path, "lingering").run("r", [Strike(1, Part.DRIVER, STEPS, 50.0, 0.0)])
    runs = RunStore(Storage.open(tmp_path))
    record = runs.load("r")
    assert record.status == "completed"
    assert len(record.attempts) == 1
    assert not recoveries([hit], rows(runs.directory("r")), record.attempts)[0].while_training


def test_a_run_that_fails_by_itself_is_shown_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(RunFailedError, match=r"ended by itself with status 1[^|]*no luck at all"):
        campaign(tmp_path, "badly").run("r", [Strike(1, Part.WORKER, 5, 0.0, 0.0)])


def test_a_run_that_stands_still_is_ended(tmp_path: Path) -> None:
    with pytest.raises(RunFailedError, match=r"showed nothing new for 3 s[^|]*it printed nothing"):
        campaign(tmp_path, "silently", patience=3.0).run("r")


class Lamp:
    """An outage that is felt or not, and says whether it was ended. After each the stub is let go on to a step."""

    def __init__(self, felt: str | None, folder: Path, *steps: int) -> None:
        self.is_on = True
        self.said = felt
        self._folder = folder
        self._steps = list(steps)

    def begin(self) -> list[int]:
        assert self.is_on
        self.is_on = False
        return [7]

    def end(self) -> None:
        assert not self.is_on
        self.is_on = True
        let_go(self._folder, self._steps.pop(0))

    def felt(self) -> str | None:
        assert not self.is_on
        return self.said


@pytest.mark.parametrize("felt", ["failing", None])
def test_what_is_taken_away_is_given_back_and_how_it_was_felt_is_noted(tmp_path: Path, felt: str | None) -> None:
    lamp = Lamp(felt, tmp_path, STEPS)
    away = AWAY if felt is None else 60.0
    (hit,) = campaign(tmp_path, HELD, away=away, mlflow=lamp).run("r", [Strike(1, Part.MLFLOW, 5, 0.0, 0.0)])
    assert lamp.is_on
    assert (hit.pids, hit.noticed) == ((7,), felt)
    assert hit.outage is not None
    assert (hit.outage < away) == (felt is not None), "once it was felt there is nothing to wait for"
    runs = RunStore(Storage.open(tmp_path))
    (found,) = recoveries([hit], rows(runs.directory("r")), runs.load("r").attempts)
    assert found.while_training
    assert found.restored is None


def test_a_backend_that_lacks_something_at_the_end_is_filled_or_the_campaign_fails(tmp_path: Path) -> None:
    stubbed = campaign(tmp_path)
    stubbed.run("r")
    assert stubbed.synced == []
    Cursor("mlflow", state=BackendState.PENDING).save(RunStore(Storage.open(tmp_path)).directory("s"))
    with pytest.raises(RunFailedError, match="sync s` ended with status 4"):
        stubbed.run("s")
    assert stubbed.synced == ["mlflow"]


def test_a_felt_outage_leaves_half_of_the_time_to_the_next_strike(tmp_path: Path) -> None:
    stubbed = campaign(tmp_path, f"held:20,{STEPS}", away=60.0, mlflow=Lamp("failing", tmp_path, 20, STEPS))
    for step in (20, STEPS):
        let_go(tmp_path, step)
    stubbed.run("undisturbed")
    for step in (20, STEPS):
        (tmp_path / f"go-{step}").unlink()
    stubbed._pace = 0.02  # as it is where nothing else runs
    strikes = [Strike(1, Part.MLFLOW, 5, 0.0, 0.0), Strike(2, Part.MLFLOW, 25, 0.0, 0.0)]
    first, _ = stubbed.run("r", strikes)
    assert first.outage is not None
    assert 0.2 <= first.outage < 60.0
