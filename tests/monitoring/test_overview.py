from __future__ import annotations

import time

import pytest

from ray_tracking.errors import RayTrackingError
from ray_tracking.monitoring.listing import newest, run_lines
from ray_tracking.monitoring.overview import enabled_backends, overview
from ray_tracking.records import Kind, Record
from ray_tracking.runs.record import Status
from ray_tracking.runs.store import RunStore
from ray_tracking.runs.summary import Summary
from ray_tracking.tracking.cursor import BackendState
from tests.monitoring.builder import RunBuilder, scalars


def test_json_has_the_designs_structure(store: RunStore) -> None:
    run = RunBuilder(store, "digits").log(scalars(range(1, 11)))
    run.backend("mlflow", offset=4, delivered=4, state=BackendState.FAILING, error="refused", location="http://x")
    run.checkpoint(5, {"val/loss": 0.2}, pinned=True)
    run.finish()

    document = overview(store, "digits", time.time()).to_json()

    assert set(document) == {
        "run_id", "name", "status", "attempts", "last_step", "metrics", "backends", "checkpoints"
    }  # fmt: skip
    (attempt,) = document["attempts"]
    assert set(attempt) == {"number", "started", "ended", "reason", "resumed_from_step"}
    assert (attempt["number"], attempt["reason"], attempt["resumed_from_step"]) == (1, "completed", -1)
    assert document["status"] == "completed"
    assert document["last_step"] == 10
    assert document["metrics"] == {"val/loss": {"last": 0.1, "best": 0.1}}
    assert document["backends"]["mlflow"] == {
        "state": "failing", "delivered": 4, "pending": 7, "dropped": 0, "run_id": None,
        "location": "http://x", "error": "refused", "unsupported": (),
    }  # fmt: skip
    assert document["checkpoints"] == (
        {"step": 5, "complete": True, "best": True, "pinned": True, "bytes": 200, "why": None},
    )


def test_best_follows_the_monitors_mode(store: RunStore) -> None:
    run = RunBuilder(store, "a", monitor="quality", mode="max")
    run.log(scalars([1, 2, 4], key="quality")).log(scalars([1, 2, 4], key="train/loss"))

    metrics = overview(store, "a", time.time()).metrics

    assert metrics["quality"] == {"last": 0.25, "best": 1.0}
    assert metrics["train/loss"] == {"last": 0.25, "best": 0.25}


def test_rows_that_the_summary_lacks_after_a_crash_are_added(store: RunStore) -> None:
    run = RunBuilder(store, "a").log(scalars(range(1, 5)))
    run.log(scalars(range(5, 21)), summarised=False)
    assert Summary.load(run.directory).last_step == 4  # what the summary alone would say

    view = overview(store, "a", time.time())

    assert view.last_step == 20
    assert view.metrics["val/loss"] == {"last": 1 / 20, "best": 1 / 20}


def test_pending_counts_journal_rows_of_all_kinds(store: RunStore) -> None:
    run = RunBuilder(store, "a").log(scalars(range(1, 4)))
    run.log([Record(Kind.TEXT, "note", 3, 1.0, None, b"hello", seq=9)])
    run.backend("tensorboard", offset=5, delivered=5, state=BackendState.COMPLETE)
    run.backend("wandb", offset=0, state=BackendState.UNAVAILABLE, error="not installed")

    backends = overview(store, "a", time.time()).backends

    assert backends["tensorboard"].pending == 0
    assert backends["wandb"].pending == 5
    assert backends["wandb"].error == "not installed"


@pytest.mark.parametrize(("finished", "state"), [(False, "starting"), (True, "pending")])
def test_a_backend_that_is_on_but_has_no_cursor_is_shown(store: RunStore, finished: bool, state: str) -> None:
    run = RunBuilder(store, "a").log(scalars([1]))
    run.config({"experiment_tracking": {"enabled": True, "mlflow": {"enabled": True}, "wandb": {"enabled": False}}})
    if finished:
        run.finish()

    backends = overview(store, "a", time.time()).backends

    assert list(backends) == ["mlflow"]
    assert (backends["mlflow"].state, backends["mlflow"].pending) == (state, 2)


def test_no_backend_is_on_when_tracking_is_off() -> None:
    assert enabled_backends({"experiment_tracking": {"enabled": False, "mlflow": {"enabled": True}}}) == []
    assert enabled_backends({}) == []


@pytest.mark.parametrize(("silent", "status"), [(59.0, "running"), (61.0, "interrupted")])
def test_a_running_run_that_is_silent_for_a_minute_is_interrupted(store: RunStore, silent: float, status: str) -> None:
    now = time.time()
    RunBuilder(store, "a", created=now - 1000).alive(now - silent)
    assert overview(store, "a", now).status == status
    assert [line.status for line in run_lines(store, now)] == [status]


def test_an_ended_run_stays_what_it_is(store: RunStore) -> None:
    now = time.time()
    RunBuilder(store, "a", created=now - 1000).alive(now - 900).finish(Status.FAILED, "boom", at=now - 800)
    assert overview(store, "a", now).status == "failed"


def test_checkpoints_in_order_with_the_best_and_the_incomplete(store: RunStore) -> None:
    run = RunBuilder(store, "a")
    run.checkpoint(10, {"val/loss": 0.1})
    run.checkpoint(20, {"val/loss": float("nan")})
    run.checkpoint(30, {"val/loss": 0.3}, complete=False)

    views = overview(store, "a", time.time()).checkpoints

    assert [(view.step, view.complete, view.best) for view in views] == [
        (10, True, True), (20, True, False), (30, False, False)
    ]  # fmt: skip
    assert "rank 1" in (views[2].why or "")


def test_a_damaged_journal_is_said_and_hides_nothing_else(store: RunStore) -> None:
    run = RunBuilder(store, "a").log(scalars([1]))
    run.log(scalars([2, 3]), summarised=False)
    names = [entry.name for entry in run.directory.list("journal/attempt-001")]
    run.directory.write_bytes(f"journal/attempt-001/{names[-1]}", b"torn")

    view = overview(store, "a", time.time())

    assert names[-1] in " ".join(view.problems)
    assert view.metrics["val/loss"]["last"] == 1.0
    assert view.to_json()["problems"] == view.problems


def test_runs_are_listed_newest_first_with_the_monitors_best(store: RunStore) -> None:
    now = time.time()
    RunBuilder(store, "b", created=now - 30).log(scalars([1, 2]))
    RunBuilder(store, "c", created=now - 20).log(scalars([1], key="other"))
    RunBuilder(store, "a", created=now - 10).log(scalars([1, 2, 4])).finish()

    lines = run_lines(store, now)

    assert [(line.run_id, line.best) for line in lines] == [("a", 0.25), ("c", None), ("b", 0.5)]
    assert newest(store) == "a"


def test_a_damaged_run_is_listed_with_the_reason(store: RunStore) -> None:
    RunBuilder(store, "good")
    store.directory("bad").write_bytes("run.json", b"{")

    lines = {line.run_id: line for line in run_lines(store, time.time())}

    assert lines["good"].error is None
    assert lines["bad"].status == "damaged"
    assert "damaged" in (lines["bad"].error or "")
    assert newest(store) == "good"
    with pytest.raises(RayTrackingError, match="damaged"):
        overview(store, "bad", time.time())


def test_folders_of_backends_are_no_runs(store: RunStore) -> None:
    RunBuilder(store, "a")
    store.storage.write_bytes("tensorboard/a/events", b"x")
    store.storage.write_bytes("mlflow.db", b"x")
    assert [line.run_id for line in run_lines(store, time.time())] == ["a"]
