"""Real children: small HTTP servers of the standard library, and once TensorBoard itself."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_tracking.cli import servers
from ray_tracking.cli.servers import Server, answers, free_port
from ray_tracking.cli.ui import plan_for
from ray_tracking.config import get_config
from ray_tracking.errors import RayTrackingError
from ray_tracking.runs.store import RunStore
from tests.cli.conftest import Cli

ROOT = Path(__file__).parents[2]


def http_server(name: str = "web") -> Server:
    port = free_port(0)
    command = (sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1")
    return Server(name, command, f"http://127.0.0.1:{port}")


def wait_until(true: Callable[[], bool], seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.05)
    return False


def test_a_taken_port_is_left_alone() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert free_port(port) != port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    assert free_port(free) == free


def test_addresses_are_said_once_they_answer_and_an_interrupt_ends_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The watcher is interrupted as soon as both have been announced."""
    started = [http_server("one"), http_server("two")]
    said: list[str] = []

    def say(line: str) -> None:
        if "http://" in line:
            assert answers(line.split()[1])
        said.append(line)
        if line.startswith("Ctrl-C"):
            raise KeyboardInterrupt

    servers.serve(started, say)
    assert sorted(line.split()[0] for line in said[:2]) == ["one", "two"]
    assert not any(answers(server.url) for server in started)


def test_a_child_that_ends_is_said_with_its_last_words() -> None:
    said: list[str] = []
    command = (sys.executable, "-c", "raise SystemExit('the port is cursed')")
    with pytest.raises(RayTrackingError, match="No server is running"):
        servers.serve([Server("bad", command, "http://127.0.0.1:9")], said.append)
    assert "ended with status 1" in said[0]
    assert "the port is cursed" in said[0]


def test_what_a_child_started_ends_with_it(tmp_path: Path) -> None:
    """A server that ignores SIGTERM and whose own child does too: both are gone afterwards."""
    code = (
        "import signal, subprocess, sys, time, pathlib\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal, time; "
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    process = servers._start(Server("stubborn", (sys.executable, "-c", code), ""), None)
    assert wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
    grandchild = int((tmp_path / "pid").read_text())
    servers.stop([process])
    assert process.poll() is not None

    def gone() -> bool:
        try:
            return "Z" in Path(f"/proc/{grandchild}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True

    assert wait_until(gone)


def test_the_plan_follows_what_lies_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = get_config()
    empty = plan_for(config, tmp_path)
    assert (empty.servers, len(empty.notes)) == ((), 2)
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "mlflow.db").write_bytes(b"")
    both = plan_for(config, tmp_path)
    assert [server.name for server in both.servers] == ["TensorBoard", "MLflow"]
    assert str(tmp_path / "tensorboard") in both.servers[0].command
    assert f"sqlite:///{tmp_path}/mlflow.db" in both.servers[1].command
    remote = plan_for(get_config(overrides={"experiment_tracking.mlflow.tracking_uri": "http://m:1"}), tmp_path)
    assert [server.name for server in remote.servers] == ["TensorBoard"]
    assert "http://m:1" in remote.notes[0]


def test_what_is_not_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "mlflow.db").write_bytes(b"")
    plan = plan_for(get_config(), tmp_path)
    assert plan.servers == ()
    assert 'pip install "ray-tracking[tensorboard]"' in plan.notes[0]
    assert 'pip install "ray-tracking[mlflow]"' in plan.notes[1]


def test_remote_missing_and_empty_storages_are_2(cli: Cli, store: RunStore) -> None:
    remote = cli("ui", "--storage", "s3://bucket/runs?region=us-east-1")
    assert (remote.code, "is remote" in remote.err) == (2, True)
    assert cli("ui", "--storage", "nowhere").code == 2
    store.storage.write_bytes("a/run.json", b"{}")
    empty = cli("ui")
    assert (empty.code, "nothing to start" in empty.err) == (2, True)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_the_program_serves_tensorboard_and_ends_it(tmp_path: Path, how: signal.Signals) -> None:
    (tmp_path / "runs" / "tensorboard").mkdir(parents=True)
    program = subprocess.Popen(
        [sys.executable, "-u", "-m", "ray_tracking", "ui", "--storage", str(tmp_path / "runs")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        # A job that a shell runs in the background begins with SIGINT ignored, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert program.stdout is not None
        address = next(line.split()[1] for line in program.stdout if line.startswith("TensorBoard "))
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        assert b"tensorboard" in opener.open(address, timeout=60).read().lower()
        program.send_signal(how)
        assert program.wait(60) == 0
        assert wait_until(lambda: not answers(address))
    finally:
        program.kill()
        program.wait()
