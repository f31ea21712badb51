"""Runs over hosts that die, or are cut off: they end like one to which nothing happened, everywhere the same."""

from __future__ import annotations

import secrets
import sys
import time
from pathlib import Path

import pytest

from ray_tracking.testing.chaos.server import MLflowServer
from tests.hosts import RAY_TRACKING, Running
from tests.multihost.conftest import Cluster
from tests.multihost.runs import JOB, TARGET, Reference, SharedRuns
from tests.s3 import S3Server, s3_server

__all__ = ["s3_server"]
pytestmark = pytest.mark.ray
_ENDS_SECONDS = 400.0
_LEASE_GONE_SECONDS = 120.0


def submit(cluster: Cluster, *options: str) -> Running:
    """From outside: no host of the cluster has to live on for it."""
    where = ("--address", cluster.head.jobs_address, "--python", sys.executable, "--follow")
    return cluster.network.start_outside(*RAY_TRACKING, "submit", "train", TARGET, *where, *options, cwd=JOB)


@pytest.mark.slow
def test_a_host_dies_and_the_run_goes_on_when_it_is_back(
    cluster: Cluster, runs: SharedRuns, reference: Reference
) -> None:
    running = submit(cluster, *runs.options("one-host"))
    runs.until_step("one-host", 12, running)
    victim = cluster.workers[-1]
    victim.kill()
    cluster.bring(victim)
    assert running.wait(_ENDS_SECONDS).status == 0, running.printed
    assert len(runs.store.load("one-host").attempts) >= 2
    reference.assert_same("one-host")


@pytest.mark.slow
def test_every_host_dies_and_a_new_cluster_goes_on_by_resume(
    cluster: Cluster, runs: SharedRuns, reference: Reference
) -> None:
    running = submit(cluster, *runs.options("all-hosts"))
    runs.until_step("all-hosts", 12, running)
    cluster.network.kill_all()
    running.end()
    cluster.restart()
    resumed = resume(cluster, runs, "all-hosts").wait(_ENDS_SECONDS)
    assert resumed.status == 0, resumed.printed
    first, *_, last = runs.store.load("all-hosts").attempts
    assert first.number == 1
    assert (last.resumed_from_step or 0) >= 5
    reference.assert_same("all-hosts")


def resume(cluster: Cluster, runs: SharedRuns, run_id: str, env: dict[str, str] | None = None) -> Running:
    """On the head, as an operator would."""
    command = ("resume", run_id, "--storage", runs.uri, "--address", cluster.head.ray_address)
    return cluster.head.start(*RAY_TRACKING, *command, cwd=JOB, env=env)


@pytest.mark.slow
def test_a_driver_that_was_cut_off_finds_another_one_in_its_place_when_it_is_back(
    cluster: Cluster, reference: Reference, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Driver and tracker on the last host, workers on the other one, storage and MLflow over the network."""
    network, (busy, lonely) = cluster.network, cluster.workers
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    cluster.bring(busy, cpus=2)
    cluster.await_nodes()
    server = MLflowServer(tmp_path, network.here)
    server.start()
    try:
        with network.forwarded(int(s3_server.endpoint.rpartition(":")[2])) as port:
            place = S3Server(s3_server.kind, f"{network.here}:{port}")
            runs = SharedRuns(place.uri(f"multihost-{secrets.token_hex(4)}"))
            options = runs.options(
                "cut",
                experiment_tracking__mlflow__enabled="true",
                experiment_tracking__mlflow__tracking_uri=server.uri,
            )
            command = ("train", TARGET, "--address", cluster.head.ray_address, *options)
            stale = lonely.start(*RAY_TRACKING, *command, cwd=JOB, env=place.environment)
            runs.until_step("cut", 12, stale)
            lonely.cut()
            fresh = taken_over(cluster, runs, "cut", place.environment)
            lonely.heal()
            assert fresh.wait(_ENDS_SECONDS).status == 0, fresh.printed
            assert stale.wait(_ENDS_SECONDS).status not in (0, None), stale.printed
            reference.assert_same("cut", runs, also=("mlflow",))
    finally:
        server.kill()
        lonely.kill()  # Ray has ended there, though the host has not


def taken_over(cluster: Cluster, runs: SharedRuns, run_id: str, env: dict[str, str]) -> Running:
    """Resume again and again, as its refusal says; returns the one that trains."""
    end = time.monotonic() + _LEASE_GONE_SECONDS
    while True:
        running = resume(cluster, runs, run_id, env)
        while running.status is None:
            if runs.newest_attempt(run_id) >= 2:
                return running
            time.sleep(0.2)
        assert running.status == 3, running.printed  # the lease is not over
        assert time.monotonic() < end, running.printed
        time.sleep(2)
