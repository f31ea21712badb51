"""`gc` and `sync` of a sweep reach its trials."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_tracking import log
from ray_tracking.runs.lease import acquire
from ray_tracking.runs.record import Status
from ray_tracking.runs.store import RunStore
from ray_tracking.tracking.cursor import BackendState
from tests.cli.conftest import Cli
from tests.monitoring.builder import RunBuilder, scalars
from tests.readback import comparable, tensorboard_points

TRACKING = {"experiment_tracking": {"tensorboard": {"enabled": True}}}
TRIALS = ("s.trial-001", "s.trial-002")


@pytest.fixture(autouse=True)
def _process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command changes the log's level and the garbage collector of its process, which here is the tests'."""
    monkeypatch.setattr(log._Settings, "level", log._Settings.level)
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


@pytest.fixture
def trials(store: RunStore) -> list[RunBuilder]:
    """A sweep of two trials whose TensorBoard was down."""
    RunBuilder(store, "s").finish()
    made = []
    for trial in TRIALS:
        run = RunBuilder(store, trial).config(TRACKING).log(scalars(range(1, 6)))
        made.append(run.backend("tensorboard", offset=0, state=BackendState.PENDING, error="no space left").finish())
    return made


def test_sync_fills_every_trial(cli: Cli, trials: list[RunBuilder], tmp_path: Path) -> None:
    done = cli("sync", "s")
    assert (done.code, done.err) == (0, "")
    assert [line.split()[:6] for line in done.out.splitlines() if line.startswith("tensorboard")] == [
        ["tensorboard", "2", "of", "2", "12", "0"]
    ]
    expected = comparable([("val/loss", step, 1.0 / step) for step in range(1, 6)], single=True)
    for trial in TRIALS:
        assert comparable(tensorboard_points(tmp_path / "runs/tensorboard/s" / trial), single=True) == expected
    document = json.loads(cli("sync", "s", "--json").out)
    assert document["backends"] == {}
    assert {trial: found["tensorboard"]["state"] for trial, found in document["trials"].items()} == dict.fromkeys(
        TRIALS, "complete"
    )


def test_a_trial_that_is_alive_keeps_no_other_from_what_it_lacks(cli: Cli, trials: list[RunBuilder]) -> None:
    lease = acquire(trials[0].directory)
    try:
        done = cli("sync", "s")
    finally:
        lease.release()
    assert done.code == 3
    assert TRIALS[0] in done.err
    assert TRIALS[1] not in done.err
    assert "1 of 1" in done.out


def test_gc_collects_in_every_trial(cli: Cli, store: RunStore) -> None:
    RunBuilder(store, "s").finish()
    for trial in TRIALS:
        run = RunBuilder(store, trial)
        run.checkpoint(1, {"val/loss": 1.0})
        run.checkpoint(2, {"val/loss": 0.5}, complete=False)
        run.finish(Status.COMPLETED)
        for path in Path(run.directory.root).rglob("*"):
            os.utime(path, (0, 0))
    shown = json.loads(cli("gc", "s", "--json").out)
    assert [(entry["run_id"], entry["step"]) for entry in shown["entries"]] == [(trial, 2) for trial in TRIALS]
    assert {entry["run_id"] for entry in json.loads(cli("gc", "--all-runs", "--json").out)["entries"]} == set(TRIALS)
    done = cli("gc", "s", "--apply")
    assert done.code == 0
    assert "2 leftovers" in done.out
    assert cli("gc", "s").out == "Nothing left over in run s and its 2 trials.\n"


def test_trials_are_compared_by_their_ids(cli: Cli, trials: list[RunBuilder]) -> None:
    document = json.loads(cli("runs", "compare", *TRIALS, "--json").out)
    assert document["runs"] == list(TRIALS)
    assert cli("runs", "compare", *TRIALS).code == 0
