"""The doctor against real files, real databases and real (small) HTTP servers; Ray's answers are recorded ones."""

from __future__ import annotations

import os
import socket
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ray_tracking.config import get_config
from ray_tracking.monitoring import doctor, doctor_backends, doctor_files, doctor_ray
from ray_tracking.monitoring.findings import Finding, Level
from ray_tracking.monitoring.web import ask


@contextmanager
def http(status: int = 200, token: str | None = None) -> Iterator[str]:
    """A server that answers every GET with `status`; with `token`, 401 without it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = token is None or self.headers.get("Authorization") == f"Bearer {token}"
            self.send_response(status if allowed else 401)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def closed_port() -> Iterator[int]:
    """Nobody else can listen on it meanwhile."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def levels(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.level.value for finding in findings}


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in list(os.environ):
        if name.startswith(("RAY_A", "WANDB_", "MLFLOW_", "NETRC")):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is, the servers here answer."""
    monkeypatch.setattr(ask, "__defaults__", (None, 60.0))


def test_every_finding_that_is_not_ok_has_a_fix(tmp_path: Path) -> None:
    config = get_config(overrides={"storage": str(tmp_path / "runs")})
    findings = doctor.examine(config)
    assert {"python", "ray", "torch", "tensorboard", "wandb", "mlflow", "ray cluster", "storage"} <= set(
        levels(findings)
    )
    assert all(finding.fix for finding in findings if finding.level is not Level.OK)
    assert not [finding for finding in findings if finding.level is Level.PROBLEM]
    assert not (tmp_path / "runs").exists()  # it looks, it leaves nothing behind


def test_a_check_that_breaks_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Finding]:
        raise RuntimeError("odd machine")

    monkeypatch.setattr(doctor, "versions", broken)
    findings = doctor.examine(get_config(overrides={"storage": str(tmp_path)}))
    assert levels(findings)["versions"] == "problem"
    assert levels(findings)["storage"] == "ok"


@pytest.mark.parametrize(("nodes", "level"), [(None, "ok"), (1, "ok"), (3, "problem")])
def test_a_local_disk_is_a_problem_only_for_several_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: int | None, level: str
) -> None:
    monkeypatch.setattr(doctor, "filesystem_of", lambda _: "ext4")
    assert levels(doctor.storage_findings(str(tmp_path), nodes))["storage shared"] == level
    monkeypatch.setattr(doctor, "filesystem_of", lambda _: "nfs4")
    assert levels(doctor.storage_findings(str(tmp_path), nodes))["storage shared"] == "ok"


def test_a_storage_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = doctor.storage_findings(str(tmp_path / "file" / "runs"), None)
    assert levels(found)["storage"] == "problem"


MOUNTS = "/dev/a / ext4 rw 0 0\nhost:/x /mnt/my\\040data nfs4 rw 0 0\ntmpfs /mnt/my\\040data/tmp tmpfs rw 0 0\n"


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/home/u", "ext4"), ("/mnt/my data/runs", "nfs4"), ("/mnt/my data", "nfs4"), ("/mnt/my data/tmp/x", "tmpfs"),
     ("/mnt/my database", "ext4")],
)  # fmt: skip
def test_filesystem_in_a_mount_table(path: str, kind: str) -> None:
    assert doctor_files.filesystem_in(MOUNTS, path) == kind
    assert doctor_files.is_network_filesystem(kind) == (kind == "nfs4")


@pytest.mark.parametrize(("mode", "level"), [(0o600, "ok"), (0o640, "problem"), (0o644, "problem"), (0o622, "problem")])
def test_login_files_others_can_read(tmp_path: Path, mode: int, level: str) -> None:
    for name in (".ray/auth_token", ".netrc"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("secret")
        file.chmod(mode)
    findings = doctor_files.file_findings(None, tmp_path, {})
    assert levels(findings) == {"file ray token": level, "file netrc": level}
    if level == "problem":
        assert findings[0].fix == f"chmod 600 {tmp_path / '.ray/auth_token'}"
        assert "secret" not in findings[0].found.replace("holds a secret", "")


def test_files_that_are_not_there_are_no_finding(tmp_path: Path) -> None:
    assert doctor_files.file_findings(None, tmp_path, {}) == []


@pytest.mark.parametrize(("text", "level"), [("params: {password: hunter22x}", "warning"), ("name: x", None)])
def test_a_config_file_with_a_secret(tmp_path: Path, text: str, level: str | None) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    file.chmod(0o644)
    findings = doctor_files.file_findings(file, tmp_path, {})
    assert levels(findings) == ({"file config": level} if level else {})
    assert "hunter22x" not in str(findings)


def test_mlflow_server(closed_port: int) -> None:
    with http() as url:
        assert levels(doctor_backends.mlflow_server(url, {})) == {"mlflow server": "ok"}
    with http(token="t") as url:
        assert levels(doctor_backends.mlflow_server(url, {})) == {"mlflow server": "problem"}
        assert levels(doctor_backends.mlflow_server(url, {"MLFLOW_TRACKING_TOKEN": "t"})) == {"mlflow server": "ok"}
    with http(404) as url:
        assert levels(doctor_backends.mlflow_server(url, {})) == {"mlflow server": "warning"}
    (finding,) = doctor_backends.mlflow_server(f"http://user:pa55word@127.0.0.1:{closed_port}", {})
    assert finding.level is Level.PROBLEM
    assert "does not answer" in finding.found
    assert "pa55word" not in str(finding)


def test_a_server_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        status, error = ask(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.3)
    assert (status, "timed out" in error) == (None, True)


@pytest.mark.parametrize("url", ["http://", "http://[x", "http://127.0.0.1:99999/"])
def test_a_url_that_is_none_is_an_answer_not_an_error(url: str) -> None:
    status, error = ask(url)
    assert status is None
    assert error


def test_sqlite(tmp_path: Path) -> None:
    path = tmp_path / "a b" / "mlflow.db"
    uri = f"sqlite:///{path}"
    assert "will be made" in doctor_backends.mlflow_server(uri, {})[0].found
    assert not path.parent.exists()
    path.parent.mkdir()
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE t (x)")
    assert levels(doctor_backends.mlflow_server(uri, {})) == {"mlflow database": "ok"}
    database.close()
    path.write_bytes(b"this is no database, " * 100)
    (finding,) = doctor_backends.mlflow_server(uri, {})
    assert finding.level is Level.PROBLEM
    assert str(path) in finding.found


def test_relative_sqlite_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sqlite3.connect("m.db").close()
    assert "m.db is writable" in doctor_backends.mlflow_server("sqlite:///m.db", {})[0].found


def test_wandb_login(tmp_path: Path, closed_port: int) -> None:
    login = doctor_backends.wandb_login
    assert levels(login("offline", {}, tmp_path)) == {"wandb login": "ok"}
    with http() as url:
        environment = {"WANDB_BASE_URL": url}
        assert levels(login("online", environment, tmp_path)) == {"wandb login": "problem", "wandb server": "ok"}
        with_key = login("online", {**environment, "WANDB_API_KEY": "k3y"}, tmp_path)
        assert levels(with_key)["wandb login"] == "ok"
        assert "k3y" not in str(with_key)
        (tmp_path / ".netrc").write_text("machine 127.0.0.1 login user password k3y\n")
        assert levels(login("online", environment, tmp_path))["wandb login"] == "ok"
    gone = login("online", {"WANDB_BASE_URL": f"http://127.0.0.1:{closed_port}"}, tmp_path)
    assert levels(gone)["wandb server"] == "problem"


def test_a_backend_that_is_on_but_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_backends, "installed_version", lambda name: None)
    config = get_config(overrides={"experiment_tracking.mlflow.enabled": True})
    findings = {finding.check: finding for finding in doctor_backends.backend_findings(config, {})}
    assert findings["mlflow"].level is Level.PROBLEM
    assert 'pip install "ray-tracking[mlflow]"' in (findings["mlflow"].fix or "")
    assert findings["wandb"].level is Level.OK  # off


# What `ray status` of Ray 2.60 said of a cluster of one node, with the numbers of others put in its form.
STATUS = """======== Autoscaler status: 2026-11-23 09:13:32.360101 ========
Node status
---------------------------------------------------------------
Active:
 1 node_9d5232a80ca4ed118907c6a04dcf5d4a195d52635ff73bafde834a20
{more}Pending:
 (no pending nodes)
Recent failures:
 (no failures)

Resources
---------------------------------------------------------------
Total Usage:
 0B/16.09GiB memory
"""


@pytest.mark.parametrize(("more", "nodes"), [("", 1), (" 1 node_ab\n 3 gpu.workers\n", 5), ("Idle:\n 2 node_cd\n", 3)])
def test_count_nodes(more: str, nodes: int) -> None:
    assert doctor_ray.count_nodes(STATUS.format(more=more)) == nodes


@pytest.fixture
def listening() -> Iterator[str]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("ours", "without", "expected", "nodes"),
    [
        ((0, STATUS.format(more="")), (1, "AuthenticationError"), {"ray cluster": "ok", "ray login": "ok"}, 1),
        ((0, STATUS.format(more="")), (0, STATUS), {"ray cluster": "ok", "ray login": "warning"}, 1),
        ((1, "ray.exceptions.AuthenticationError: x"), (1, ""), {"ray login": "problem"}, None),
        ((1, "RpcError: version mismatch"), (1, ""), {"ray cluster": "problem"}, None),
        ((None, ""), (None, ""), {"ray cluster": "problem"}, None),
    ],
)
def test_what_the_cluster_says(
    monkeypatch: pytest.MonkeyPatch,
    listening: str,
    ours: tuple[int | None, str],
    without: tuple[int | None, str],
    expected: dict[str, str],
    nodes: int | None,
) -> None:
    monkeypatch.setattr(doctor_ray, "_ray_status", lambda _address, **variables: without if variables else ours)
    findings, view = doctor_ray.ray_findings(listening)
    assert levels(findings) == expected
    assert view.nodes == nodes


def test_where_nothing_listens(closed_port: int) -> None:
    findings, _ = doctor_ray.ray_findings(f"127.0.0.1:{closed_port}")
    assert levels(findings) == {"ray cluster": "problem"}
    assert "nothing answers" in findings[0].found


def test_the_jobs_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with http() as url:
        assert levels(doctor_ray.ray_findings(url)[0]) == {"ray cluster": "ok", "ray login": "warning"}
    with http(token="t0ken") as url:
        assert levels(doctor_ray.ray_findings(url)[0]) == {"ray login": "problem"}
        (tmp_path / "token").write_text("t0ken\n")
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
        assert levels(doctor_ray.ray_findings(url)[0]) == {"ray cluster": "ok", "ray login": "ok"}
        monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
        assert levels(doctor_ray.ray_findings(url)[0]) == {"ray login": "problem"}
    with http(404) as url:
        assert "no Ray dashboard" in doctor_ray.ray_findings(url)[0][0].found


@pytest.mark.parametrize("address", ["nonsense", "host:port", "ray://host"])
def test_what_is_no_address(address: str) -> None:
    findings, _ = doctor_ray.ray_findings(address)
    assert levels(findings) == {"ray cluster": "problem"}
    assert "HOST:PORT" in (findings[0].fix or "")


def test_the_address_in_use() -> None:
    assert doctor_ray.address_in_use("a:1", {"RAY_ADDRESS": "b:2"}) == "a:1"
    assert doctor_ray.address_in_use(None, {"RAY_ADDRESS": "b:2"}) == "b:2"
    assert doctor_ray.address_in_use(None, {"RAY_ADDRESS": ""}) is None
