"""What is said when something else than a willing Ray dashboard answers. A real one is in test_on_cluster.py."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from ray_tracking.errors import UsageError
from ray_tracking.runtime.jobs import client as client_module
from ray_tracking.runtime.jobs.access import Token
from ray_tracking.runtime.jobs.client import JobsClient, StreamBroken, TakenError, UnknownJobError, UnreachableError

NO_TOKEN = Token(None, "there is none")
VERSION = {"version": "4", "ray_version": "2.60.0", "ray_commit": "x", "session_name": "s"}


class Server:
    """Answers paths as `answers` says: (status, text); the headers that came are kept."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, str]] = {"/api/version": (200, json.dumps(VERSION))}
        self.tokens: list[str | None] = []
        self.delay = 0.0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                time.sleep(server.delay)
                server.tokens.append(self.headers.get("Authorization"))
                status, text = server.answers.get(self.path.partition("?")[0], (404, "no such page"))
                with contextlib.suppress(OSError):  # whoever asked did not wait
                    self.send_response(status)
                    self.end_headers()
                    self.wfile.write(text.encode())

            do_POST = do_GET  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def test_the_given_address_wins_over_rays_variables(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    client = JobsClient(server.address, Token("abc", "RAY_AUTH_TOKEN"))
    assert client.ray_version == "2.60.0"
    assert set(server.tokens) == {"Bearer abc"}
    assert os.environ["RAY_ADDRESS"] == "127.0.0.1:6379"


def test_without_a_token_none_is_sent(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    # Ray adds its own where it is in token mode, as this process is once it has run a cluster of the tests.
    monkeypatch.setattr("ray._private.authentication.authentication_utils.is_token_auth_enabled", lambda: False)
    JobsClient(server.address, NO_TOKEN)
    assert set(server.tokens) == {None}


@pytest.mark.parametrize(
    ("token", "status", "said"),
    [
        (NO_TOKEN, 401, "wants a token, and we sent none: there is none"),
        (Token("wrong-token-value", "/home/me/token"), 403, "refuses our token (from /home/me/token)"),
    ],
)
def test_a_token_that_is_not_taken_comes_with_the_fix(server: Server, token: Token, status: int, said: str) -> None:
    server.answers["/api/version"] = (status, "Unauthorized")
    with pytest.raises(UsageError) as raised:
        JobsClient(server.address, token)
    assert said in str(raised.value)
    assert "RAY_AUTH_TOKEN_PATH" in str(raised.value)
    assert "wrong-token-value" not in str(raised.value)
    assert not isinstance(raised.value, UnreachableError)


@pytest.mark.parametrize("answer", [(404, "nothing"), (200, "<html>"), (200, "{}"), (500, "oops")])
def test_another_server_is_told_from_rays(server: Server, answer: tuple[int, str]) -> None:
    server.answers["/api/version"] = answer
    with pytest.raises(UsageError, match="8265") as raised:
        JobsClient(server.address, NO_TOKEN)
    assert server.address in str(raised.value)


def test_nothing_there_is_said_at_once() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        begun = time.monotonic()
        with pytest.raises(UnreachableError, match=rf"127\.0\.0\.1:{port}.*\n.*ray start --head"):
            JobsClient(f"http://127.0.0.1:{port}", NO_TOKEN)
    assert time.monotonic() - begun < 10


def test_a_server_that_hangs_is_not_waited_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "ANSWER_SECONDS", 0.3)
    server.delay = 100.0
    begun = time.monotonic()
    with pytest.raises(UnreachableError):
        JobsClient(server.address, NO_TOKEN)
    assert time.monotonic() - begun < 4


def test_all_time_outs_together_keep_the_promise_of_fifteen_seconds() -> None:
    assert client_module.CONNECT_SECONDS + client_module.ANSWER_SECONDS < 13


@pytest.mark.parametrize(
    ("status", "text", "kind"),
    [
        (404, "Job demo-1 does not exist", UnknownJobError),
        (500, "Traceback ...\nTimeoutError: Failed to get head node agent", UnreachableError),
        (400, "Traceback ...\nValueError: Job with submission_id demo-1 already exists.", TakenError),
        (400, "Traceback ...\nValueError: a bad thing", UsageError),
    ],
)
def test_answers_about_jobs(server: Server, status: int, text: str, kind: type[Exception]) -> None:
    client = JobsClient(server.address, NO_TOKEN)
    server.answers["/api/jobs/demo-1"] = (status, text)
    with pytest.raises(kind) as raised:
        client.job("demo-1")
    assert type(raised.value) is kind


@pytest.mark.parametrize(
    ("status", "kind"), [(404, UnknownJobError), (403, UsageError), (500, StreamBroken), (200, StreamBroken)]
)
def test_a_log_that_cannot_be_followed(server: Server, status: int, kind: type[Exception]) -> None:
    """A new cluster at the address does not know the job: that must not pass for a broken connection."""
    client = JobsClient(server.address, NO_TOKEN)
    server.answers["/api/jobs/demo-1/logs/tail"] = (status, "no")
    with pytest.raises(kind) as raised:
        client.stream("demo-1", lambda _: None, skip=7)
    assert type(raised.value) is kind
    if isinstance(raised.value, StreamBroken):
        assert raised.value.passed == 7


def test_living_nodes_with_all_they_have(server: Server) -> None:
    rows = [
        {
            "node_id": "a",
            "node_ip": "10.0.0.1",
            "state": "ALIVE",
            "resources_total": {"CPU": 2.0},
            "labels": {"k": "v"},
        },
        {"node_id": "b", "node_ip": "10.0.0.2", "state": "DEAD", "resources_total": {}, "labels": {}},
    ]
    server.answers["/api/v0/nodes"] = (200, json.dumps({"data": {"result": {"result": rows}}}))
    (node,) = JobsClient(server.address, NO_TOKEN).nodes()
    assert (node.node_id, node.host, node.resources, node.labels) == ("a", "10.0.0.1", {"CPU": 2.0}, {"k": "v"})


def test_only_our_jobs_are_listed(server: Server) -> None:
    def job(submission_id: str, **metadata: str) -> dict[str, Any]:
        base = {"type": "SUBMISSION", "status": "RUNNING", "entrypoint": "x", "start_time": 2000}
        return {**base, "submission_id": submission_id, "metadata": metadata}

    ours = [job(f"demo-{n}", ray_tracking_run="demo", ray_tracking_number=str(n)) for n in (10, 2)]
    driver = {"type": "DRIVER", "job_id": "01000000", "status": "RUNNING", "entrypoint": ""}
    server.answers["/api/jobs/"] = (200, json.dumps([*ours, job("other"), driver]))
    client = JobsClient(server.address, NO_TOKEN)
    assert [found.submission_id for found in client.jobs()] == ["demo-2", "demo-10"]
    assert client.jobs_of("demo")[0].started == 2.0
    assert client.jobs_of("x") == []
