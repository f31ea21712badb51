"""MLflow's real server, stopped for a part of a run or for the rest of it: in the end its history is the journal's."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from ray_tracking.records import Kind
from ray_tracking.runs.record import RunRecord
from ray_tracking.runs.store import RunStore
from ray_tracking.storage import Storage
from ray_tracking.testing.chaos.server import MLflowServer
from ray_tracking.tracking import syncing
from ray_tracking.tracking.cursor import BackendState, Cursor
from ray_tracking.tracking.recorded import tracking_of
from ray_tracking.tracking.transport import pack
from tests.readback import mlflow_run
from tests.tracking.faults.conftest import SECONDS, Track, Tracked, in_mlflow, journaled


def sync(run: Tracked, **options: Any) -> tuple[RunRecord, syncing.Outcome]:
    store = RunStore(Storage.open(run.folder))
    record = store.load(run.run_id)
    tracking = tracking_of(record, Cursor.load_all(run.directory), {})
    (outcome,) = syncing.sync(store, record, tracking, **options)
    return record, outcome


@pytest.mark.slow
def test_for_the_middle_third_and_for_the_rest(
    tmp_path: Path, track: Track, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")  # as it is by default: nothing hangs here
    (folder := tmp_path / "server").mkdir()
    server = MLflowServer(folder)
    server.start()
    try:
        mlflow = {"enabled": True, "tracking_uri": server.uri}
        middle = track({"mlflow": mlflow, "delivery": {"final_secs": SECONDS}}, "middle")
        rest = track({"mlflow": mlflow, "delivery": {"final_secs": 4}}, "rest")
        for run in (middle, rest):
            run.log(100)
            run.wait_delivered()
        server.kill()
        for run in (middle, rest):
            run.log(100)
            run.wait_for(BackendState.FAILING)
        began = time.monotonic()
        report = rest.close()["mlflow"]
        assert time.monotonic() - began < 4 + 15
        assert (report["state"], report["pending"]) == ("pending", 200)
        _, outcome = sync(rest)  # while it is still down
        assert (outcome.state, outcome.delivered, outcome.pending) == (BackendState.PENDING, 0, 200)
        assert server.uri in (outcome.error or "")
        assert capsys.readouterr().err.count("backend fails") == 3  # each run's once, and the sync in vain

        server.start()
        middle.log(100)
        middle.wait_delivered()
        assert middle.close()["mlflow"]["state"] == "complete"
        assert in_mlflow(server, middle) == journaled(middle)

        for options, delivered in (({}, 200), ({}, 0), ({"touched": ["mlflow"]}, 0), ({"again": True}, 400)):
            record, outcome = sync(rest, **options)
            assert (outcome.state, outcome.delivered) == (BackendState.COMPLETE, delivered)
            assert in_mlflow(server, rest) == journaled(rest)
            info = mlflow_run(server.uri, Cursor.load(rest.directory, "mlflow").run_id or "").info
            assert info.status == "FINISHED"
            assert record.ended is not None
            assert (info.start_time, info.end_time) == (int(record.created * 1000), int(record.ended * 1000))

        rest.directory.delete("cursors/mlflow.json")  # as if the tracker had died before it could save it
        _, outcome = sync(rest)
        assert outcome.state is BackendState.COMPLETE
        assert in_mlflow(server, rest) == journaled(rest)
    finally:
        server.kill()


def test_a_run_that_never_had_it(track: Track, tmp_path: Path, mlflow_server: MLflowServer) -> None:
    """Everything comes over: metrics, params, tags, text, artifacts, from a journal that was compacted long ago."""
    from mlflow import MlflowClient

    run = track({})
    run.log(100)
    (tmp_path / "runs" / run.run_id / "artifacts").mkdir()
    (tmp_path / "runs" / run.run_id / "artifacts/notes.txt").write_text("kept")
    artifact = json.dumps({"path": "notes.txt", "size": 4, "digest": ""}).encode()
    events = [
        (101, Kind.PARAM.value, 0, 1.0, {"lr": b"0.1"}),
        (102, Kind.TAG.value, 0, 1.0, {"team": b"vision"}),
        (103, Kind.TEXT.value, 7, 1.0, {"note": b"hello"}),
        (104, Kind.ARTIFACT.value, 0, 1.0, {"notes": artifact}),
    ]
    run.service.append(0, run.attempt, pack(events))
    assert run.close() == {}
    store = RunStore(Storage.open(run.folder))
    record = store.load(run.run_id)
    given = {"experiment_tracking.mlflow.tracking_uri": mlflow_server.uri}
    (outcome,) = syncing.sync(store, record, tracking_of(record, [], given, ["mlflow"]))
    assert (outcome.state, outcome.delivered, outcome.location) == (BackendState.COMPLETE, 204, mlflow_server.uri)
    assert in_mlflow(mlflow_server, run) == journaled(run)
    run_id = Cursor.load(run.directory, "mlflow").run_id or ""
    data = mlflow_run(mlflow_server.uri, run_id).data
    assert (data.params["lr"], data.tags["team"]) == ("0.1", "vision")
    client = MlflowClient(mlflow_server.uri)
    for path, text in (("text/note/7.txt", "hello"), ("notes.txt", "kept")):
        assert Path(client.download_artifacts(run_id, path, str(tmp_path))).read_text() == text
    # Now it is known where it went: no setting is needed any more.
    tracking = tracking_of(record, Cursor.load_all(run.directory), {})
    assert (tracking.mlflow.enabled, tracking.mlflow.tracking_uri) == (True, mlflow_server.uri)
