"""MLflow on SQLite and over HTTP, read back by MLflow's client."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from ray_tracking.errors import BackendError, BackendRefusedError
from ray_tracking.records import Artifact, Kind
from ray_tracking.tracking.backends.base import BackendIdentity, RunInfo
from ray_tracking.tracking.backends.mlflow import MLflowBackend
from tests.readback import comparable, mlflow_points, mlflow_run
from tests.tracking.backends.records import grid, png, record, scalars


@pytest.fixture
def run(mlflow_dir: Path, run_info: RunInfo) -> RunInfo:
    return run_info


def points_of(identity: BackendIdentity) -> list[tuple[str, int, str]]:
    return comparable(mlflow_points(identity.location, identity.run_id))


def test_2500_metrics_sent_twice_stand_once(run: RunInfo) -> None:
    backend = MLflowBackend()
    identity = backend.open(run, None)
    assert identity.location == f"sqlite:///{run.local_dir}/mlflow.db"
    points = grid(range(1, 251), keys=10)
    backend.write(scalars(points))
    again = MLflowBackend()
    assert again.open(run, identity) == identity
    again.write(scalars(points))
    again.close("completed")
    assert points_of(identity) == comparable(points)
    found = mlflow_run(identity.location, identity.run_id)
    assert (found.info.status, found.info.run_name) == ("FINISHED", "first run")
    assert found.data.tags["team"] == "vision"
    assert found.info.artifact_uri.startswith(f"{run.local_dir}/mlflow-artifacts/")


def test_a_trial_is_shown_below_its_sweep_as_soon_as_that_is_there(run: RunInfo) -> None:
    trial = MLflowBackend(experiment_name=run.name)
    of_trial = replace(run, run_id=f"{run.run_id}.trial-003")
    with pytest.raises(BackendError, match="is not there yet"):
        trial.open(of_trial, None)
    sweep = MLflowBackend(experiment_name=run.name).open(run, None)
    identity = trial.open(of_trial, None)
    assert mlflow_run(identity.location, identity.run_id).data.tags["mlflow.parentRunId"] == sweep.run_id
    assert "mlflow.parentRunId" not in mlflow_run(sweep.location, sweep.run_id).data.tags


def test_odd_values_and_repeats(run: RunInfo) -> None:
    points = [
        ("a", 1, math.nan),
        ("a", 2, math.inf),
        ("a", 3, -math.inf),
        ("a", 4, 1e300),
        ("a", 5, 2.0),
        ("a", 5, 2.0),
    ]
    backend = MLflowBackend()
    identity = backend.open(run, None)
    backend.write(scalars(points))
    backend.close("completed")
    assert points_of(identity) == comparable(points)


def test_a_crash_before_the_identity_was_saved_makes_no_second_run(run: RunInfo) -> None:
    first = MLflowBackend()
    identity = first.open(run, None)
    first.close("interrupted")
    second = MLflowBackend()
    assert second.open(run, None) == identity
    assert mlflow_run(identity.location, identity.run_id).info.status == "RUNNING"
    assert second.open(replace(run, run_id="r2"), None) != identity


def test_a_run_deleted_in_mlflow_is_made_anew(run: RunInfo) -> None:
    from mlflow import MlflowClient

    backend = MLflowBackend()
    identity = backend.open(run, None)
    MlflowClient(identity.location).delete_run(identity.run_id)
    again = backend.open(run, identity)
    assert again.run_id != identity.run_id
    backend.write(scalars(grid([1])))
    assert points_of(again) == comparable(grid([1]))


@pytest.mark.parametrize(
    ("status", "shown"),
    [("completed", "FINISHED"), ("failed", "FAILED"), ("aborted", "KILLED"), ("interrupted", "KILLED")],
)
def test_status(run: RunInfo, status: str, shown: str) -> None:
    backend = MLflowBackend()
    identity = backend.open(run, None)
    backend.close(status)
    assert mlflow_run(identity.location, identity.run_id).info.status == shown


def test_params_and_tags_are_cut_and_a_changed_param_keeps_its_first_value(run: RunInfo) -> None:
    backend = MLflowBackend()
    identity = backend.open(run, None)
    backend.write(
        [
            *(record(Kind.PARAM, f"p{i}", str(i).encode()) for i in range(150)),
            record(Kind.PARAM, "long", json.dumps("x" * 7000).encode()),
            record(Kind.PARAM, "nul", json.dumps("a\0b\ud800").encode()),
            record(Kind.PARAM, "p1", b"99"),
            *(record(Kind.TAG, f"t{i}", b"v") for i in range(150)),
            record(Kind.TAG, "long", b"y" * 9000),
        ]
    )
    again = MLflowBackend()
    again.open(run, identity)
    again.write([record(Kind.PARAM, "p2", b"98"), record(Kind.PARAM, "p3", b"3"), record(Kind.PARAM, "ü/?", b"7")])
    assert (backend.changed_params, again.changed_params) == (1, 1)
    data = mlflow_run(identity.location, identity.run_id).data
    assert [data.params[f"p{i}"] for i in range(150)] == [str(i) for i in range(150)]
    assert len(data.params["long"]) == 6000
    assert data.params["long"].endswith("…[cut]")
    assert data.params["nul"] == "a\\x00b\\ud800"
    assert len(data.params) == 153
    assert sum(data.tags.get(f"t{i}") == "v" for i in range(150)) == 150
    assert len(data.tags["long"]) == 5000


def test_texts_images_and_artifacts(run: RunInfo, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    Path(run.artifacts, "plots").mkdir()
    Path(run.artifacts, "plots/a.txt").write_text("kept")
    artifact = Artifact("plots/a.txt", 4, "").encode()
    backend = MLflowBackend()
    identity = backend.open(run, None)
    backend.write(
        [
            record(Kind.TEXT, "eval/note", "häppy 🎉".encode()),
            record(Kind.IMAGE, "../digits ü", png()),
            record(Kind.ARTIFACT, "plot", artifact),
            record(Kind.ARTIFACT, "gone", Artifact("plots/b.txt", 4, "").encode()),
        ]
    )
    client = MlflowClient(identity.location)

    def names(path: str | None = None) -> Iterator[str]:
        for entry in client.list_artifacts(identity.run_id, path):
            if entry.is_dir:
                yield from names(entry.path)
            else:
                yield entry.path

    found = sorted(names())
    assert found[0] == "config.json"
    assert found[1].startswith("images/digits")
    assert found[1].endswith("/3.png")
    assert found[2:] == ["plots/a.txt", "text/eval/note/3.txt"]
    assert Path(client.download_artifacts(identity.run_id, found[1], str(tmp_path))).read_bytes() == png()
    assert Path(client.download_artifacts(identity.run_id, found[3], str(tmp_path))).read_text() == "häppy 🎉"


@pytest.mark.parametrize("log_models", [True, False])
def test_models_are_copied_only_if_asked_for(run: RunInfo, log_models: bool) -> None:
    from mlflow import MlflowClient

    Path(run.artifacts, "net.bin").write_text("weights")
    backend = MLflowBackend(log_models=log_models)
    identity = backend.open(run, None)
    backend.write([record(Kind.ARTIFACT, "model/net", Artifact("net.bin", 7, "").encode())])
    found = [entry.path for entry in MlflowClient(identity.location).list_artifacts(identity.run_id)]
    assert ("net.bin" in found) is log_models


def test_a_dead_port_answers_within_seconds(run: RunInfo) -> None:
    with socket.socket() as bound:  # so that nobody else gets the port; it is not listened on
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        backend = MLflowBackend(tracking_uri=f"http://user:secret@127.0.0.1:{port}")
        began = time.monotonic()
        with pytest.raises(BackendError, match="tracking_uri") as raised:
            backend.open(run, None)
        assert time.monotonic() - began < 10  # by itself MLflow's client tries for minutes
    assert not isinstance(raised.value, BackendRefusedError)
    assert "secret" not in str(raised.value)


_BODIES = {
    401: b"You are not authenticated.",
    403: b'{"error_code": "PERMISSION_DENIED", "message": "Permission denied"}',
}


class _Answers(BaseHTTPRequestHandler):
    status = 200

    def _answer(self) -> None:
        body = _BODIES.get(self.status, b"Bad gateway")
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Retry-After", "17")
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = _answer  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize(("status", "refused"), [(401, True), (403, True), (429, False), (503, False)])
def test_what_a_server_answers(run: RunInfo, status: int, refused: bool) -> None:
    server = HTTPServer(("127.0.0.1", 0), type("Answers", (_Answers,), {"status": status}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        with pytest.raises(BackendError) as raised:
            MLflowBackend(tracking_uri=f"http://127.0.0.1:{server.server_port}").open(run, None)
    finally:
        server.shutdown()
        server.server_close()
    assert isinstance(raised.value, BackendRefusedError) is refused
    assert raised.value.retry_after == (None if refused else 17.0)
    if refused:
        assert "MLFLOW_TRACKING_USERNAME" in str(raised.value)


def test_a_deleted_experiment_is_named(run: RunInfo) -> None:
    from mlflow import MlflowClient

    backend = MLflowBackend(experiment_name="gone")
    identity = backend.open(run, None)
    client = MlflowClient(identity.location)
    client.delete_experiment(client.get_experiment_by_name("gone").experiment_id)
    with pytest.raises(BackendRefusedError, match="'gone' was deleted"):
        MLflowBackend(experiment_name="gone").open(run, None)


def test_the_environment_names_the_server(run: RunInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"sqlite:///{run.local_dir}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    elsewhere = RunInfo("r1", "r1", local_dir=str(tmp_path / "elsewhere"))
    assert MLflowBackend().open(elsewhere, None).location == uri
    assert not os.path.exists(tmp_path / "elsewhere/mlflow.db")


def test_mlflow_is_quiet(run: RunInfo) -> None:
    MLflowBackend().open(run, None)
    assert logging.getLogger("mlflow").level == logging.WARNING
    assert logging.getLogger("alembic").level == logging.WARNING
