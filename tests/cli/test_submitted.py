"""`submit`, `logs`, `status` and `stop` on a real cluster with a dashboard in token mode."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest

from ray_tracking.checkpoint.store import CheckpointStore
from ray_tracking.errors import UsageError
from ray_tracking.journal.reader import JournalReader
from ray_tracking.runs.store import RunStore
from tests.cli.conftest import Cli, Outcome

pytestmark = pytest.mark.ray

PLANTED = "planted-" + "5f1c2e9ab7d04c61"
"""A secret in this process's environment and, by another path, in that of the cluster's nodes."""
START_SECONDS = 240.0
REFUSAL_SECONDS = 15.0
"""On a machine that has time; `timed` allows for others' work on it."""
CPUS = 3

TRAIN = """
import hashlib, os, time, torch

def train(run):
    secret = os.environ.get("WANDB_API_KEY", "").encode()
    assert hashlib.sha256(secret).hexdigest() == "DIGEST", "the worker lacks the node's secret"
    model = run.prepare(torch.nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = run.loader(torch.utils.data.TensorDataset(torch.ones(40, 2)), batch_size=4)
    run.restore(model=model, optimizer=optimizer, loader=loader)
    for epoch in run.epochs(run.params["epochs"]):
        for (x,) in run.steps(loader):
            loss = model(x).square().mean()
            optimizer.zero_grad(); loss.backward(); optimizer.step()
            run.log_metrics({"loss": loss})
            print("step", run.step, flush=True)
            time.sleep(run.params["pause"])

def fail_once(run):
    if run.attempt == 1:
        raise ArithmeticError("the first attempt fails")
    train(run)
"""


class Ray(NamedTuple):
    """A running cluster: `processes` are one `ray start --block` per host, the head's first."""

    url: str
    token: Path
    environment: dict[str, str]
    address: str
    processes: list[subprocess.Popen[bytes]]
    directory: Path

    def assert_lives(self) -> None:
        """Fails with what the cluster's own logs say where its head or its dashboard has gone."""
        place = urlsplit(self.url)
        with suppress(OSError), socket.create_connection((place.hostname, place.port), timeout=5):
            return
        logs = [self.directory / "start.log", *self.directory.glob("ray/session_latest/logs/dashboard*.*")]
        told = "\n".join(f"{log}:\n{log.read_text()[-3000:]}" for log in logs if log.is_file())
        pytest.fail(f"nothing listens at {self.url}, the head's exit status: {self.processes[0].poll()}\n{told}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def ray() -> Iterator[Ray]:
    with running(free_port(), free_port()) as made:
        yield made


@contextmanager
def running(port: int, dashboard: int, token: Path | None = None) -> Iterator[Ray]:
    directory = Path(tempfile.mkdtemp(prefix="rtj", dir="/tmp"))  # Ray's socket names must stay below 108 characters
    if token is None:
        token = directory / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_TRACKING_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "WANDB_API_KEY": PLANTED,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    made = Ray(f"http://127.0.0.1:{dashboard}", token, environment, f"127.0.0.1:{port}", [], directory)
    log = directory / "start.log"
    start(
        made, log, "--head", f"--port={port}", f"--dashboard-port={dashboard}", "--include-dashboard=true",
        "--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1", f"--temp-dir={directory / 'ray'}",
        f"--num-cpus={CPUS}", "--object-store-memory=200000000", f"--ray-client-server-port={free_port()}",
        f"--dashboard-agent-listen-port={free_port()}", "--labels=zone=head",
    )  # fmt: skip
    try:
        await_jobs_api(made, log)
        yield made
    finally:
        for process in reversed(made.processes):
            kill(process)
        shutil.rmtree(directory, ignore_errors=True)


def start(ray: Ray, log: Path, *arguments: str, before: tuple[str, ...] = ()) -> None:
    command = [*before, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *arguments]
    with log.open("ab") as output:
        made = subprocess.Popen(
            command, env=ray.environment, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
    ray.processes.append(made)


def kill(process: subprocess.Popen[bytes]) -> None:
    """The host dies: every process on it at once."""
    import psutil

    everything = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in everything:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(everything, timeout=20)
    process.wait()


def await_jobs_api(ray: Ray, log: Path) -> None:
    from ray_tracking.runtime.jobs.access import Token
    from ray_tracking.runtime.jobs.client import JobsClient

    def answers() -> bool:
        assert ray.processes[0].poll() is None, log.read_text()
        try:
            return bool(JobsClient(ray.url, Token(ray.token.read_text(), "test")).nodes())
        except UsageError:
            return False

    wait_until(answers, START_SECONDS, log.read_text)


def wait_until(holds: Callable[[], bool], seconds: float, why: Callable[[], str] = lambda: "") -> None:
    stop = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > stop:
            pytest.fail(f"not within {seconds} s: {why()}")
        time.sleep(0.25)


@pytest.fixture
def folder(store: RunStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder that is sent, as the working directory; runs lie outside of it."""
    made = tmp_path / "project"
    made.mkdir()
    monkeypatch.chdir(made)
    (made / "job.py").write_text(TRAIN.replace("DIGEST", hashlib.sha256(PLANTED.encode()).hexdigest()))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return made


@pytest.fixture
def project(folder: Path, ray: Ray, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(ray.token))
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", ray.url)
    ray.assert_lives()
    yield folder
    ray.assert_lives()


def options(run_id: str, epochs: int = 2, pause: float = 0.0, **further: object) -> list[str]:
    settings = {"params.epochs": epochs, "params.pause": pause, "failure.max_failures": 0, **further}
    pairs = [text for key, value in settings.items() for text in ("--set", f"{key}={value}")]
    return ["--run-id", run_id, "--env", "testing", *pairs]


def timed(cli: Cli, *arguments: str) -> tuple[Outcome, float]:
    """The outcome, and the seconds it took as they would be if nothing else ran on this machine."""
    begun = time.monotonic()
    done = cli(*arguments)
    waiting_for_a_processor = max(os.getloadavg()[0] / (os.cpu_count() or 1), 1.0)
    return done, (time.monotonic() - begun) / waiting_for_a_processor


def steps(store: RunStore, run_id: str) -> list[int]:
    table = JournalReader(store.directory(run_id)).effective()
    return [
        step
        for key, step in zip(table.column("key").to_pylist(), table.column("step").to_pylist(), strict=True)
        if key == "loss"
    ]


def test_what_the_cluster_cannot_do_is_refused_within_15_s(
    cli: Cli, ray: Ray, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = ("submit", "train", "job.py:train", *options("never"))
    cases = {
        ("--set", "scaling.workers=8", "--set", "scaling.use_gpu=true"): "8 workers need 8 GPU, it has 0",
        ("--set", "scaling.workers=4"): f"4 workers need 4 CPU, it has {CPUS}",
        ("--driver-cpus", "2", "--set", "scaling.workers=2"): "beside the driver",
        ("--driver-label", "zone=!head"): "no node can take the driver (label zone=!head)",
        ("--address", f"http://127.0.0.1:{free_port()}"): "No Ray cluster answers",
    }
    for arguments, said in cases.items():
        done, seconds = timed(cli, *submit, *arguments)
        assert (done.code, seconds < REFUSAL_SECONDS) == (2, True), (arguments, seconds, done)
        assert said in done.err
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    for command in (submit, ("logs", "never"), ("status", "never", "--address", ray.url)):
        done, seconds = timed(cli, *command)
        assert (done.code, seconds < REFUSAL_SECONDS) == (2, True), (command, seconds, done)
        assert "refuses our token (from RAY_AUTH_TOKEN)" in done.err
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "wants a token" in cli(*submit).err


def test_a_run_submitted_stopped_and_submitted_again_is_one_run(
    cli: Cli, ray: Ray, project: Path, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", PLANTED)
    done = cli("submit", "train", "job.py:train", "--driver-label", "zone=head", *options("demo", 600, 0.2))
    assert (done.code, done.out.splitlines()[:1]) == (0, ["demo-1"]), done
    wait_until(lambda: store.exists("demo") and steps(store, "demo") != [], START_SECONDS)

    shown = json.loads(cli("status", "demo", "--json").out)
    assert shown["job"] == {"submission_id": "demo-1", "address": ray.url, "status": "RUNNING"}
    wait_until(lambda: "step 1" in cli("logs", "demo").out, START_SECONDS)
    again = cli("submit", "train", "job.py:train", *options("demo"))
    assert (again.code, "demo-1" in again.err) == (3, True)

    assert_no_secret(ray)
    stopped = cli("stop", "demo", "--timeout", "240")
    assert stopped.code == 0, stopped
    record = store.load("demo")
    assert (record.status.value, "stopped" in (record.attempts[-1].reason or "")) == ("aborted", True), record.attempts
    reached = max(info.step for info in CheckpointStore(store.directory("demo")).checkpoints())
    assert f"its last checkpoint is of step {reached}" in " ".join(stopped.out.split())
    wait_until(lambda: json.loads(cli("status", "demo", "--json").out)["job"]["status"] == "FAILED", START_SECONDS)

    total = (reached // 10 + 2) * 10
    done = cli("submit", "train", "job.py:train", "--follow", *options("demo", total // 10))
    assert done.code == 0, done
    assert f"step {total}\n" in done.out
    assert "demo-2 is SUCCEEDED" in done.err
    assert store.load("demo").status.value == "completed"
    assert steps(store, "demo") == list(range(1, total + 1))
    with cutting(ray.url, [1500, 3000]) as (url, cuts):
        followed = cli("logs", "demo", "-f", "--address", url)
    assert (followed.out, cuts) == (done.out, [])
    assert "Lost the connection" in followed.err
    assert cli("logs", "demo", "--job", "1").out != done.out
    assert cli("submit", "train", "job.py:train", *options("demo")).code == 3  # it is completed


@contextmanager
def cutting(url: str, cuts: list[int]) -> Iterator[tuple[str, list[int]]]:
    """A way to the dashboard that breaks each log's connection after the next of `cuts` bytes, and then no more."""
    place = urlsplit(url)
    assert place.hostname is not None
    upstream = (place.hostname, place.port or 80)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection(upstream) as dashboard:
                request = self.request.recv(65536)
                left = cuts.pop(0) if b"/logs/tail" in request and cuts else 1 << 40
                dashboard.sendall(request)
                threading.Thread(target=self.send_on, args=(dashboard,), daemon=True).start()
                while left > 0 and (data := dashboard.recv(min(left, 65536))):
                    left -= len(data)
                    self.request.sendall(data)

        def send_on(self, dashboard: socket.socket) -> None:
            with suppress(OSError):
                while data := self.request.recv(65536):
                    dashboard.sendall(data)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", cuts
        server.shutdown()


def assert_no_secret(ray: Ray) -> None:
    """Byte search in all that the Jobs API tells of any job."""
    import requests

    headers = {"Authorization": f"Bearer {ray.token.read_text()}"}
    for path in ("/api/jobs/", "/api/jobs/demo-1", "/api/v0/jobs?detail=1", "/api/v0/runtime_envs?detail=1"):
        answer = requests.get(ray.url + path, headers=headers, timeout=20)
        assert answer.status_code == 200, (path, answer.text)
        assert PLANTED.encode() not in answer.content, path
        assert ray.token.read_bytes() not in answer.content, path


@pytest.mark.slow
def test_a_run_that_fails_is_started_again_and_goes_on(cli: Cli, project: Path, store: RunStore) -> None:
    arguments = ("submit", "train", "job.py:fail_once", "--follow", "--retries", "1", *options("once", 1))
    done = cli(*arguments)
    assert done.code == 0, done
    assert "the first attempt fails" in done.out
    assert "The job once-1 failed (exit status 1)" in done.err
    assert "once-2 is SUCCEEDED" in done.err
    assert steps(store, "once") == list(range(1, 11))
    assert len(store.load("once").attempts) == 2


@pytest.mark.slow
def test_a_storage_that_one_host_does_not_share_is_refused_by_its_name(
    cli: Cli, ray: Ray, project: Path, store: RunStore, tmp_path: Path
) -> None:
    if os.getuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare, for a host with a folder of its own")
    shared = tmp_path / "runs"
    shared.mkdir(exist_ok=True)
    host = "127.0.0.2"
    start(
        ray, tmp_path / "host.log", f"--address={ray.address}", f"--node-ip-address={host}", "--num-cpus=1",
        "--object-store-memory=100000000",
        before=("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none "{shared}" && exec "$@"', "sh"),
    )  # fmt: skip
    from ray_tracking.runtime.jobs.access import Token
    from ray_tracking.runtime.jobs.client import JobsClient

    client = JobsClient(ray.url, Token(ray.token.read_text(), "test"))

    def both_are_there() -> bool:
        try:
            return len(client.nodes()) == 2
        except UsageError:  # a dashboard that is busy
            return False

    wait_until(both_are_there, START_SECONDS, lambda: (tmp_path / "host.log").read_text())
    try:
        done, seconds = timed(cli, "submit", "train", "job.py:train", *options("apart"))
    finally:
        kill(ray.processes.pop())
    assert (done.code, seconds < REFUSAL_SECONDS) == (2, True), (seconds, done)
    assert f"The host {host} does not share the storage {shared}" in done.err
    assert not store.exists("apart")


@pytest.mark.slow
def test_a_lost_cluster_is_waited_for_and_the_run_goes_on_in_the_next_one(
    folder: Path, store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head dies while `submit --retries` looks on; another cluster comes up at its address."""
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    places, said = (free_port(), free_port()), tmp_path / "said"
    every_5 = {"training.default.save_steps": 5}
    with running(*places, token) as first:
        with said.open("wb") as output:
            submitter = subprocess.Popen(
                [sys.executable, "-m", "ray_tracking", "submit", "train", "job.py:train", "--address", first.url,
                 "--follow", "--retries", "2", *options("lost", 8, 0.3, **every_5)],
                stdout=output, stderr=subprocess.STDOUT,
                env={**first.environment, "RAY_TRACKING_STORAGE": store.storage.root},
            )  # fmt: skip
        checkpoints = CheckpointStore(store.directory("lost"))
        try:
            wait_until(
                lambda: bool(checkpoints.checkpoints()) and "step 8\n" in said.read_text(), 200.0, said.read_text
            )
        finally:
            kill(first.processes[0])
    try:
        wait_until(lambda: "Lost the connection" in said.read_text(), 60.0, said.read_text)
        with running(*places, token):
            assert submitter.wait(4 * START_SECONDS) == 0, said.read_text()
    finally:
        submitter.kill()
        submitter.wait()
    told = said.read_text()
    assert "The job lost-1 was lost with its cluster" in told
    assert "Started again as lost-2" in told
    assert store.load("lost").status.value == "completed"
    assert steps(store, "lost") == list(range(1, 81))
    assert [attempt.resumed_from_step for attempt in store.load("lost").attempts][1] > 0
