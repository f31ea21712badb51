"""What can't work on a cluster of several hosts is said at once, and says what to do: nothing hangs for want of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.hosts import DASHBOARD_PORT, RAY_TRACKING, Running
from tests.multihost.conftest import Cluster
from tests.multihost.runs import JOB, TARGET, SharedRuns

pytestmark = [pytest.mark.ray, pytest.mark.slow]
_SOON = 15.0
_IMPORTS_QUIET = 4.0
"""Seconds that `import ray.train.torch` takes where nothing else runs: a refusal on a busy machine gets as much longer
as that does."""
_BUSY, _UNEVEN = 1.25, 1.5
"""From so many times as long on the machine is busy; then its load is not the same all the time."""
_USAGE = 2


def submit(cluster: Cluster, *words: str, address: str | None = None, env: dict[str, str] | None = None) -> Running:
    where = ("--address", address or cluster.head.jobs_address, "--python", sys.executable, "--follow")
    command = (*RAY_TRACKING, "submit", "train", TARGET, *where, *words)
    return cluster.network.start_outside(*command, cwd=JOB, env=env).wait(60)


def train(cluster: Cluster, *words: str, address: str | None = None, env: dict[str, str] | None = None) -> Running:
    where = ("--address", address or cluster.head.ray_address)
    return cluster.head.run(*RAY_TRACKING, "train", TARGET, *where, *words, cwd=JOB, env=env)


def check(cluster: Cluster, done: Running, *said: str) -> None:
    assert done.status == _USAGE, done.printed
    for words in said:
        assert words in " ".join(done.printed.split()), done.printed
    assert "Traceback" not in done.printed
    if done.seconds >= _SOON:
        imports = cluster.head.run(sys.executable, "-c", "import ray.train.torch").seconds
        slower = imports / _IMPORTS_QUIET
        allowed = _SOON * (1.0 if slower < _BUSY else slower * _UNEVEN)
        assert done.seconds < allowed, f"after {done.seconds:.0f} s, {allowed:.0f} allowed:\n{done.printed}"


@pytest.mark.parametrize("start", [submit, train])
def test_a_wrong_token(start, cluster: Cluster, runs: SharedRuns, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("f" * 64)
    done = start(cluster, *runs.options("wrong-token"), env={"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")})
    check(cluster, done, "token", "RAY_AUTH_TOKEN_PATH")
    assert not runs.store.exists("wrong-token")


@pytest.mark.parametrize("start", [submit, train])
def test_no_cluster_at_the_address(start, cluster: Cluster, runs: SharedRuns) -> None:
    """Nobody has the address at all: not even a refusal comes back."""
    nobody = f"{cluster.network.subnet}.200"
    address = f"http://{nobody}:{DASHBOARD_PORT}" if start is submit else f"{nobody}:6379"
    done = start(cluster, *runs.options("no-cluster"), address=address)
    check(cluster, done, "No Ray cluster answers", nobody, "--address" if start is train else "dashboard")
    assert not runs.store.exists("no-cluster")


@pytest.mark.parametrize("start", [submit, train])
def test_gpus_that_the_cluster_has_not(start, cluster: Cluster, runs: SharedRuns) -> None:
    done = start(cluster, *runs.options("no-gpus", scaling__use_gpu="true", scaling__workers="8"))
    check(cluster, done, "8 workers need 8 GPU, it has 0", "scaling.workers")
    assert not runs.store.exists("no-gpus")


def test_a_storage_that_one_host_does_not_see(cluster: Cluster, runs: SharedRuns, shared: Path) -> None:
    blind = cluster.workers[0]
    blind.kill()  # what it sees is settled when it boots
    blind.hide(shared)
    cluster.bring(blind)
    cluster.await_nodes()
    for start in (submit, train):
        done = start(cluster, *runs.options("not-shared"))
        check(cluster, done, f"The host {blind.address} does not share the storage", "NFS")
        assert not runs.store.exists("not-shared")
