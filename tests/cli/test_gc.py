from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from ray_tracking.checkpoint import nearby_folders
from ray_tracking.runs.record import Status
from ray_tracking.runs.store import RunStore
from tests.cli.conftest import Cli
from tests.monitoring.builder import RunBuilder
from tests.monitoring.checkpoint_dirs import DELETABLE, GOOD, LEFT_ALONE, good_directory, save_ranks, spoil


@pytest.fixture
def spoilt(store: RunStore, tmp_path: Path) -> Path:
    """Every way in which something is no checkpoint, long untouched, among three good ones."""
    spoil(tmp_path / "spoilt", good_directory())
    for path in (tmp_path / "spoilt").rglob("*"):
        if not path.parent.name.endswith(tuple(str(step) for step in GOOD)):
            os.utime(path, (0, 0))
    return tmp_path / "spoilt"


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_dry_run_lists_exactly_what_does_not_count(cli: Cli, spoilt: Path) -> None:
    before = names(spoilt)
    done = cli("gc", "--dir", str(spoilt), "--json")
    assert done.code == 0
    document = json.loads(done.out)
    assert document["applied"] is False
    kinds = {entry["path"]: entry["kind"] for entry in document["entries"]}
    assert kinds == {**DELETABLE, **LEFT_ALONE}
    assert {entry["path"] for entry in document["entries"] if entry["delete"]} == set(DELETABLE)
    assert all(entry["why"] for entry in document["entries"])
    assert document["bytes"] == sum(entry["bytes"] for entry in document["entries"] if entry["delete"])
    assert names(spoilt) == before


def test_apply_deletes_it_and_nothing_else(cli: Cli, spoilt: Path) -> None:
    before = names(spoilt)
    done = cli("gc", "--dir", str(spoilt), "--apply")
    assert done.code == 0
    assert "6 leftovers" in done.out
    assert names(spoilt) == before - set(DELETABLE)
    assert cli("checkpoints", "verify", "--dir", str(spoilt)).code == 0
    again = json.loads(cli("gc", "--dir", str(spoilt), "--apply", "--json").out)
    assert {entry["path"] for entry in again["entries"]} == set(LEFT_ALONE)


def test_for_people(cli: Cli, spoilt: Path) -> None:
    done = cli("gc", "--dir", str(spoilt))
    words = " ".join(done.out.split())
    assert "Would be deleted in" in words
    assert "Left alone in" in words
    assert "6 leftovers (" in words
    assert words.endswith("would be deleted; --apply does it, 6 left alone.")
    assert "\x1b" not in done.out
    assert max(map(len, done.out.splitlines())) <= 80


def test_a_folder_that_may_be_a_save_under_way_is_left_until_told(cli: Cli, spoilt: Path) -> None:
    fresh = spoilt / "step-000011"
    os.utime(fresh / "model.safetensors", None)
    entries = json.loads(cli("gc", "--dir", str(spoilt), "--apply", "--json").out)["entries"]
    (entry,) = [entry for entry in entries if entry["path"] == "step-000011"]
    assert (entry["delete"], "under way" in entry["kept"], fresh.is_dir()) == (False, True, True)
    assert "--idle" in cli("gc", "--dir", str(spoilt)).out
    assert cli("gc", "--dir", str(spoilt), "--apply", "--idle").code == 0
    assert not fresh.exists()


def test_pinned_is_never_touched(cli: Cli, spoilt: Path) -> None:
    (spoilt / "step-000011" / "pinned").touch()
    assert cli("gc", "--dir", str(spoilt), "--apply", "--idle").code == 0
    assert (spoilt / "step-000011").is_dir()


@pytest.mark.parametrize(
    ("status", "left"),
    [("running", {"attempt-002/step-000020"}), ("ended", set()), ("silent", {"attempt-002/step-000020"})],
)
def test_a_run(cli: Cli, store: RunStore, status: str, left: set[str]) -> None:
    """The first attempt was killed in a save, the second is (or was) writing one."""
    run = RunBuilder(store, "digits", created=time.time() - 7200)
    save_ranks(run.directory, "attempt-001", 10)
    save_ranks(run.directory, "attempt-001", 15, ranks=1)
    run.resume(10)
    save_ranks(run.directory, "attempt-002", 20, ranks=1)
    if status == "ended":
        run.finish(Status.FAILED, "killed")
    run.alive(time.time() - (3600 if status == "silent" else 1))
    if status == "silent":
        old = run.record.attempts[-1]
        run.record = run.record.end_attempt(old.started, "lost").begin_attempt(time.time() - 3600, 2)
        store.save(run.record)
    old_one = Path(run.directory.path("attempt-001/step-000015"))
    for path in (old_one, *old_one.iterdir()):
        os.utime(path, (0, 0))
    assert cli("gc", "--apply").code == 0
    found = {entry["path"] for entry in json.loads(cli("gc", "--json").out)["entries"]}
    assert found == left
    assert [entry["step"] for entry in json.loads(cli("checkpoints", "ls", "--json").out)] == [10]


def test_all_runs_and_the_scripts_directory_in_one_pass(cli: Cli, store: RunStore, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run = RunBuilder(store, name).finish()
        (Path(run.directory.path()) / "attempt-001" / "step-000005").mkdir(parents=True)
    spoil(tmp_path / "runs" / "checkpoints", good_directory())
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "run.json").write_text("{")
    document = json.loads(cli("gc", "--all-runs", "--idle", "--apply", "--json").out)
    deleted = [(entry["run_id"], entry["path"]) for entry in document["entries"] if entry["delete"]]
    assert {("a", "attempt-001/step-000005"), ("b", "attempt-001/step-000005")} <= set(deleted)
    assert {path for run_id, path in deleted if run_id is None} == set(DELETABLE)
    (problem,) = document["problems"]
    assert problem.startswith("broken: ")


def test_nothing_left_over(cli: Cli, store: RunStore) -> None:
    RunBuilder(store, "clean")
    done = cli("gc")
    assert (done.code, done.out) == (0, "Nothing left over in run clean.\n")
    wrong = cli("gc", "clean", "--all-runs")
    assert wrong.code == 2


@pytest.fixture
def shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the machine's shared memory."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(nearby_folders.leftovers, "__defaults__", (folder,))
    monkeypatch.setattr(nearby_folders.of_run, "__defaults__", (folder,))
    return folder


def test_copies_in_memory(cli: Cli, store: RunStore, shared_memory: Path) -> None:
    """Of a run that lives: never; that may come back: when told so; that has ended: gone."""
    runs = {name: RunBuilder(store, name).finish() for name in ("lives", "recent", "gone")}
    claims = {name: nearby_folders.claim(run.directory, shared_memory) for name, run in runs.items()}
    for name, held in claims.items():
        (held.path / "copy").write_bytes(bytes(100))
        if name != "lives":
            os.close(held._file)
    os.utime(claims["gone"].path / nearby_folders._LOCK, (0, 0))

    def memory(*arguments: str) -> dict[str, bool]:
        found = json.loads(cli("gc", *arguments, "--json").out)["memory"]
        return {entry["directory"].rpartition("/")[2]: entry["delete"] for entry in found}

    assert memory("recent") == {"recent": False}
    assert memory("--all-runs") == {"lives": False, "recent": False, "gone": True}
    shown = " ".join(cli("gc", "--all-runs", "--apply").out.split())
    assert "In this machine's memory" in shown
    assert "--idle" in shown
    assert memory("--all-runs", "--idle") == {"lives": False, "recent": True}
    assert cli("gc", "--all-runs", "--idle", "--apply").code == 0
    assert memory("--all-runs", "--idle") == {"lives": False}
    assert (claims["lives"].path / "copy").exists()
    claims["lives"].release()
