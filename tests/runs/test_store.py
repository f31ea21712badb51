"""Where runs lie, and what may be one."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_tracking.errors import NameRefusedError, UsageError
from ray_tracking.runs.record import RunRecord
from ray_tracking.runs.store import RunStore, check_run_id, default_storage, free_run_id, new_run_id
from ray_tracking.storage import Storage


def test_saved_found_and_loaded(tmp_path: Path) -> None:
    store = RunStore(Storage.open(tmp_path))
    for run_id in ("b", "a"):
        store.save(RunRecord(run_id, "run", 1.0))
    assert list(store.ids()) == ["a", "b"]
    assert store.load("a") == RunRecord("a", "run", 1.0)
    assert (store.exists("a"), store.exists("c")) == (True, False)
    with pytest.raises(UsageError, match=r"No run 'c'.*Runs there: a, b"):
        store.load("c")


def test_other_folders_are_no_runs(tmp_path: Path) -> None:
    store = RunStore(Storage.open(tmp_path))
    store.save(RunRecord("a", "run", 1.0))
    for name in (".ipynb_checkpoints", "tensorboard", "wandb", "empty", "größe", "x\ny", "mlflow.db"):
        (tmp_path / name).mkdir()
        if name != "empty":
            (tmp_path / name / "run.json").write_bytes(RunRecord("x", "x", 1.0).to_json())
    (tmp_path / "file").write_text("")
    assert list(store.ids()) == ["a"]


def test_new_ids_differ_within_one_second_and_are_allowed() -> None:
    ids = {new_run_id("digits") for _ in range(2000)}
    assert len(ids) == 2000
    for name in ("", "../up", "a b/c", "é" * 300, "x" * 300, ".hidden", "\0"):
        assert check_run_id(new_run_id(name))


@pytest.mark.parametrize(
    "run_id", ["", "..", "../x", "/x", "a/b", "a\\b", "%2e", "a\0", "wandb", "latest", "m.db", "x" * 201]
)
def test_refused_ids(run_id: str) -> None:
    with pytest.raises(NameRefusedError):
        check_run_id(run_id)


def test_default_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_storage() == "./runs"
    monkeypatch.setenv("RAY_TRACKING_STORAGE", "s3://bucket/runs")
    assert default_storage() == "s3://bucket/runs"


@pytest.mark.parametrize(
    ("taken", "free"),
    [
        ((), "x"),
        (("y", "x-2"), "x"),
        (("x",), "x-2"),
        (("x", "x-2", "x-3"), "x-4"),
        (("x", "x-3"), "x-2"),
        (("x", *(f"x-{n}" for n in range(2, 12))), "x-12"),
    ],
)
def test_a_new_run_never_gets_an_id_that_is_taken(taken: tuple[str, ...], free: str) -> None:
    assert free_run_id("x", set(taken).__contains__) == free


def test_an_id_that_becomes_too_long_is_refused() -> None:
    with pytest.raises(NameRefusedError):
        free_run_id("x" * 199, {"x" * 199}.__contains__)


def test_an_id_is_taken_as_soon_as_a_run_is_begun(tmp_path: Path) -> None:
    store = RunStore(Storage.open(tmp_path))
    assert not store.is_taken("a")
    store.directory("a").write_bytes("lease/000001-0000", b"{}")
    assert store.is_taken("a")
    assert not store.exists("a")


def test_whether_a_record_is_what_lies_there(tmp_path: Path) -> None:
    store, record = RunStore(Storage.open(tmp_path)), RunRecord("a", "run", 1.0)
    assert not store.holds(record)
    store.save(record)
    assert store.holds(record)
    assert not store.holds(RunRecord("a", "run", 2.0))
