"""Who uses the copies in a node's memory, and when they go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ray_tracking.checkpoint import nearby_folders
from ray_tracking.checkpoint.nearby_folders import KEPT_SECONDS, Claim, claim, forget, leftovers, of_run, remove
from ray_tracking.storage import Storage

HOLD = (
    "import sys, time\nfrom pathlib import Path\nfrom ray_tracking.checkpoint.nearby_folders import claim\n"
    "from ray_tracking.storage import Storage\n"
    "held = claim(Storage.open(sys.argv[1]), Path(sys.argv[2]))\nprint('held', flush=True)\ntime.sleep(600)"
)


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    path = tmp_path / "shm"
    path.mkdir(mode=0o777)
    return path


def run(name: str) -> Storage:
    return Storage.open(f"/somewhere/runs/{name}")


def put(held: Claim, name: str = "copy") -> Path:
    path = held.path / name
    path.write_bytes(b"12345")
    return path


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path / nearby_folders._LOCK, (then, then))


def test_a_folder_of_this_user_alone(shared: Path) -> None:
    held = claim(run("a"), shared)
    base = held.path.parent
    assert base.parent == shared
    assert [path.stat().st_mode & 0o777 for path in (base, held.path)] == [0o700, 0o700]
    assert (held.path / nearby_folders._LOCK).stat().st_mode & 0o777 == 0o600
    assert held.path == of_run(run("a"), shared)
    assert "a" not in held.path.name.split("-"), "a run's name may say more than it should"
    assert of_run(run("b"), shared) != held.path
    held.release()


@pytest.mark.parametrize("how", ["open to others", "a link", "a file"])
def test_a_folder_that_someone_else_may_have_made_is_refused(shared: Path, tmp_path: Path, how: str) -> None:
    base = shared / f"ray-tracking-{os.geteuid()}"
    if how == "open to others":
        base.mkdir()
        base.chmod(0o755)
    elif how == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        base.symlink_to(tmp_path / "elsewhere")
    else:
        base.write_text("")
    with pytest.raises(OSError, match=r"closed to others|exists"):
        claim(run("a"), shared)
    assert leftovers(shared) == []


def test_the_last_one_takes_it_away(shared: Path) -> None:
    first, second = claim(run("a"), shared), claim(run("a"), shared)
    copy = put(first)
    first.release()
    assert copy.exists()
    second.release()
    assert list(shared.iterdir()) == []
    second.release()


def test_of_many_that_end_at_once_one_takes_it_away(shared: Path) -> None:
    for _ in range(20):
        claims = [claim(run("a"), shared) for _ in range(8)]
        put(claims[0])
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(Claim.release, claims))
        assert list(shared.iterdir()) == []


def test_killed_processes_leave_it_for_the_next(shared: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, run("a").uri, str(shared)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    (found,) = leftovers(shared)
    assert (found.directory, found.in_use) == (run("a").uri, True)
    assert not remove(found)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (found.path / "copy").write_bytes(b"12345")
    (found,) = leftovers(shared)
    assert (found.in_use, found.bytes, found.is_recent(time.time())) == (False, 5 + len(run("a").uri), True)
    other = claim(run("b"), shared)
    assert (found.path / "copy").exists(), "its workers may still be started again"
    again = claim(run("a"), shared)
    assert (again.path / "copy").read_bytes() == b"12345"
    for held in (other, again):
        held.release()


def test_another_run_sweeps_what_nobody_came_back_to(shared: Path) -> None:
    left, used = claim(run("left"), shared), claim(run("used"), shared)
    paths = [put(left), put(used)]
    os.close(left._file)
    age(left.path, KEPT_SECONDS + 1)
    age(used.path, KEPT_SECONDS + 1)
    (left.path.parent / f"{nearby_folders._GONE}1").mkdir()  # killed in the middle of a removal
    (left.path.parent / "empty").mkdir()  # killed before there was a lock in it
    os.utime(left.path.parent / "empty", (0, 0))
    claim(run("new"), shared).release()
    assert [path.exists() for path in paths] == [False, True]
    assert [path.path for path in leftovers(shared)] == [used.path]
    used.release()


def test_forgotten_at_the_end_of_a_run(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearby_folders, "_PAUSE_SECONDS", 0.01)
    held = claim(run("a"), shared)
    copy = put(held)
    forget(run("a"), shared)
    assert copy.exists(), "a process of it lives"
    monkeypatch.setattr(nearby_folders, "_TRIES", 6000)
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(forget, run("a"), shared)
        os.close(held._file)
        ending.result()
    assert not held.path.exists()
    forget(run("never there"), shared)


def test_a_claim_on_a_folder_that_is_being_removed_makes_a_new_one(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the opening of the lock file and the lock, someone else removes the folder."""
    first = claim(run("a"), shared)
    put(first)
    opened = nearby_folders._opened
    calls = []

    def then_removed(path: Path) -> int:
        file = opened(path)
        calls.append(path)
        if len(calls) == 1:
            monkeypatch.setattr(nearby_folders, "_opened", opened)
            first.release()
        return file

    monkeypatch.setattr(nearby_folders, "_opened", then_removed)
    second = claim(run("a"), shared)
    assert os.path.samestat(os.fstat(second._file), (second.path / nearby_folders._LOCK).stat())
    assert not (second.path / "copy").exists()
    second.release()


def test_a_lock_that_is_never_given_up_is_an_error_not_a_hang(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    monkeypatch.setattr(nearby_folders, "_PAUSE_SECONDS", 0.001)
    held = claim(run("a"), shared)
    fcntl.flock(held._file, fcntl.LOCK_EX)
    with pytest.raises(TimeoutError, match="locked"):
        claim(run("a"), shared)
    held.release()
