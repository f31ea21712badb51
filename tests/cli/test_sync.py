"""`sync`: fills what is lacking, says why it can't, refuses a run that is alive."""

from __future__ import annotations

import gc
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_tracking import log
from ray_tracking.journal import JournalWriter
from ray_tracking.runs.lease import acquire
from ray_tracking.runs.record import Status
from ray_tracking.runs.store import RunStore
from ray_tracking.tracking.cursor import BackendState, Cursor
from tests.cli.conftest import Cli
from tests.monitoring.builder import RunBuilder, scalars
from tests.readback import comparable, mlflow_points, tensorboard_points, wandb_points

POINTS = comparable([("val/loss", step, 1.0 / step) for step in range(1, 51)])
SINGLE = comparable([("val/loss", step, 1.0 / step) for step in range(1, 51)], single=True)


@pytest.fixture(autouse=True)
def _process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command changes the log's level and the garbage collector of its process, which here is the tests'."""
    monkeypatch.setattr(log._Settings, "level", log._Settings.level)
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


@pytest.fixture
def run(store: RunStore) -> RunBuilder:
    """Completed with TensorBoard alone, which was down; the journal is compacted."""
    run = RunBuilder(store, "digits").config({"experiment_tracking": {"tensorboard": {"enabled": True}}})
    run.log(scalars(range(1, 51)))
    JournalWriter(run.directory, 2).compact()
    return run.backend("tensorboard", offset=0, state=BackendState.PENDING, error="no space left").finish()


def test_what_was_pending(cli: Cli, run: RunBuilder, tmp_path: Path) -> None:
    shown = cli("runs", "show", "digits").out
    assert "Fill them: ray-tracking sync digits\n" in shown
    done = cli("sync", "digits")
    assert done.code == 0, done.err
    assert [line.split()[:4] for line in done.out.splitlines()[1:3]] == [
        ["backend", "state", "delivered", "pending"],
        ["tensorboard", "complete", "51", "0"],
    ]
    assert done.err == ""
    assert comparable(tensorboard_points(tmp_path / "runs/tensorboard/digits"), single=True) == SINGLE
    document = json.loads(cli("sync", "digits", "--json").out)
    assert document == {
        "run_id": "digits",
        "backends": {
            "tensorboard": {
                "state": "complete",
                "delivered": 0,
                "pending": 0,
                "location": str(tmp_path / "runs/tensorboard/digits"),
                "error": None,
            }
        },
    }
    assert "Fill them" not in cli("runs", "show", "digits").out
    assert comparable(tensorboard_points(tmp_path / "runs/tensorboard/digits"), single=True) == SINGLE


def test_backends_that_the_run_never_had(cli: Cli, run: RunBuilder, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/elsewhere.db"
    place = f"experiment_tracking.mlflow.tracking_uri={uri}"
    for _ in range(2):
        done = cli("sync", "digits", "--backend", "mlflow", "--backend", "wandb", "--set", place)
        assert done.code == 0, done.err
        mlflow, wandb = (Cursor.load(run.directory, name) for name in ("mlflow", "wandb"))
        assert (mlflow.state, mlflow.location, wandb.state) == (BackendState.COMPLETE, uri, BackendState.COMPLETE)
        assert comparable(mlflow_points(uri, mlflow.run_id or "")) == POINTS
        assert comparable(wandb_points(tmp_path / "runs/wandb", "digits")) == POINTS
    assert Cursor.load(run.directory, "tensorboard").state is BackendState.PENDING  # it was not asked for
    done = cli("sync", "digits", "--json")  # now they are its backends too, and it is known where MLflow is
    assert done.code == 0, done.err
    found = {name: backend["location"] for name, backend in json.loads(done.out)["backends"].items()}
    assert (sorted(found), found["mlflow"]) == (["mlflow", "tensorboard", "wandb"], uri)


def test_files_that_were_deleted_come_again(cli: Cli, run: RunBuilder, tmp_path: Path) -> None:
    assert cli("sync", "digits").code == 0
    for file in (folder := tmp_path / "runs/tensorboard/digits").iterdir():
        file.unlink()
    assert cli("sync", "digits").code == 0
    assert comparable(tensorboard_points(folder)) == []  # complete is complete, unless asked
    assert cli("sync", "digits", "--backend", "tensorboard").code == 0
    assert comparable(tensorboard_points(folder), single=True) == SINGLE


def test_one_that_still_fails_is_1_with_the_reason_and_the_others_are_filled(
    cli: Cli, run: RunBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray_tracking.tracking.patience.retry_wait", lambda *_: 0.01)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{unused.getsockname()[1]}"
    settings = ("experiment_tracking.mlflow.enabled=true", f"experiment_tracking.mlflow.tracking_uri={uri}")
    done = cli("sync", "digits", *(word for setting in settings for word in ("--set", setting)))
    assert done.code == 1
    assert f"mlflow is pending: MLflow at {uri}" in done.err
    assert done.err.count(uri) <= 3  # the reason once, not once for each try
    assert Cursor.load(run.directory, "tensorboard").state is BackendState.COMPLETE
    as_json = cli("sync", "digits", "--backend", "mlflow", "--set", settings[1], "--json")
    assert as_json.code == 1
    assert json.loads(as_json.out)["backends"]["mlflow"]["pending"] == 51


def test_one_that_is_alive_is_refused(cli: Cli, store: RunStore, tmp_path: Path) -> None:
    live = RunBuilder(store, "live").config({"experiment_tracking": {"tensorboard": {"enabled": True}}})
    live.log(scalars(range(1, 51)))
    done = cli("sync", "live")
    assert done.code == 3
    assert "shows signs of life" in done.err
    lease = acquire(live.directory)
    done = cli("sync", "live")
    assert done.code == 3
    assert "is being written by pid" in done.err
    assert "ray-tracking status live" in done.err
    lease.release()  # its process has died, say
    assert cli("sync", "live").code == 0
    assert store.load("live").status is Status.RUNNING


def test_wrong_usage(cli: Cli, run: RunBuilder, store: RunStore) -> None:
    for arguments, said in {
        ("digits", "--backend", "tensorbord"): "Did you mean tensorboard?",
        ("digits", "--set", "params.lr=1"): "run has ended",
        ("digits", "--set", "experiment_tracking.mlflow.uri=x"): "is not a known key",
        ("nosuch",): "No run 'nosuch'",
    }.items():
        done = cli("sync", *arguments)
        assert (done.code, said in done.err) == (2, True), done.err
    RunBuilder(store, "bare").finish()
    assert "has no backend" in cli("sync", "bare").err
