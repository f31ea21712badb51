"""MLflow's real server, runs that go on while it misbehaves, and what they left to be compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_tracking.journal.reader import JournalReader
from ray_tracking.runs.store import new_run_id
from ray_tracking.storage import Storage
from ray_tracking.testing.chaos.server import MLflowServer
from ray_tracking.tracking.cursor import BackendState, Cursor
from ray_tracking.tracking.service import TrackerService
from ray_tracking.tracking.spec import TrackerSpec
from ray_tracking.tracking.transport import pack
from tests.readback import Point, comparable, mlflow_points
from tests.tracking.fakes import wait_until

SECONDS = 90.0
"""For what takes two on a quiet machine."""
OFF: dict[str, Any] = {name: {"enabled": False} for name in ("tensorboard", "wandb", "mlflow")}


class Tracked:
    """A run whose tracker is in this process, logging two points a step."""

    def __init__(self, folder: Path, tracking: dict[str, Any], run_id: str | None = None) -> None:
        self.folder = folder
        self.run_id = run_id = run_id or new_run_id("run")  # a server that tests share knows runs by it
        self.directory = Storage.open(folder).child(run_id)
        spec = TrackerSpec(run_id, "faults", str(folder), str(folder), tracking={**OFF, **tracking})
        self.service = TrackerService(spec, alone=False)
        self.attempt = self.service.begin_attempt(1)
        self.step = 0
        self.journaled = 0.0
        """The longest that the journal took for a batch, in seconds: it must not know of backends."""

    def log(self, steps: int) -> None:
        for _ in range(steps):
            self.step += 1
            metrics = {"loss": 1.0 / self.step, "accuracy": self.step / 1000}
            batch = pack([(self.step, "scalar", self.step, 1_700_000_000.0 + self.step, metrics)])
            began = time.monotonic()
            self.service.append(0, self.attempt, batch)
            self.journaled = max(self.journaled, time.monotonic() - began)

    def cursor(self, backend: str = "mlflow") -> Cursor:
        (delivery,) = (one for one in self.service._deliveries if one.cursor.backend == backend)
        return delivery.state

    def wait_for(self, *states: BackendState, backend: str = "mlflow") -> None:
        wait_until(lambda: self.cursor(backend).state in states, SECONDS)

    def wait_delivered(self, backend: str = "mlflow") -> None:
        wait_until(lambda: self.cursor(backend).offset == self.service.status()["next_offset"], SECONDS)

    def close(self) -> dict[str, Any]:
        backends: dict[str, Any] = self.service.close("completed", "done")["backends"]
        return backends


Track = Callable[..., Tracked]


@pytest.fixture
def track(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Track]:
    """Runs that deliver ten times a second; the waits after a failure are the real ones."""
    monkeypatch.setattr("ray_tracking.tracking.delivery._PAUSE_SECONDS", 0.1)
    monkeypatch.setattr("ray_tracking.tracking.delivery._FLUSH_SECONDS", 2.0)
    monkeypatch.setattr("ray_tracking.tracking.service._SUMMARY_SECONDS", 0.1)
    runs: list[Tracked] = []

    def track(tracking: dict[str, Any], run_id: str | None = None) -> Tracked:
        runs.append(Tracked(tmp_path / "runs", tracking, run_id))
        return runs[-1]

    yield track
    for run in runs:
        for delivery in run.service._deliveries:
            delivery.finish("interrupted", 0.0)
        run.service._closing.set()
        run.service._hold.release()


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLflowServer]:
    """One that stays up."""
    server = MLflowServer(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def _client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "6")  # no busy machine takes so long by itself


def journaled(run: Tracked) -> list[tuple[str, int, str]]:
    """The points of the effective history."""
    table = JournalReader(run.directory).effective()
    points: list[Point] = list(zip(*(table[name].to_pylist() for name in ("key", "step", "value")), strict=True))
    return comparable(points)


def in_mlflow(server: MLflowServer, run: Tracked) -> list[tuple[str, int, str]]:
    """All that the server has, asked without a proxy between."""
    run_id = Cursor.load(run.directory, "mlflow").run_id
    assert run_id is not None
    return comparable(mlflow_points(server.uri, run_id))
