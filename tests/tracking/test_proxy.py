"""That the proxy does to a client what it says."""

from __future__ import annotations

import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest
import requests

from tests.tracking.proxy import Answer, Hanging, LosingReplies, Passing, Proxy, Resetting


class _Echo(BaseHTTPRequestHandler):
    written: list[bytes]
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.written.append(body)
        self.send_response(201)
        self.send_header("X-Path", self.path)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = _handle  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def written() -> list[bytes]:
    return []


@pytest.fixture
def proxy(written: list[bytes]) -> Iterator[Proxy]:
    server = HTTPServer(("127.0.0.1", 0), type("Echo", (_Echo,), {"written": written}))
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    with Proxy(f"http://127.0.0.1:{server.server_port}") as running:
        yield running
    server.shutdown()
    server.server_close()


def test_passes_on_with_or_without_delay(proxy: Proxy, written: list[bytes]) -> None:
    answer = requests.post(f"{proxy.uri}/a?b=c", data=b"x" * 100_000, timeout=60)
    assert (answer.status_code, answer.headers["X-Path"], answer.content) == (201, "/a?b=c", b"x" * 100_000)
    with proxy.behaving(Passing(delay=0.3)):
        began = time.monotonic()
        assert requests.get(proxy.uri, timeout=60).status_code == 201
        assert time.monotonic() - began >= 0.3
    assert len(written) == 2


def test_an_open_connection_meets_the_new_mode(proxy: Proxy, written: list[bytes]) -> None:
    with requests.Session() as client:
        assert client.get(proxy.uri, timeout=60).status_code == 201
        with proxy.behaving(Answer(429, {"Retry-After": "7"})):
            answer = client.post(proxy.uri, data=b"x", timeout=60)
            assert (answer.status_code, answer.headers["Retry-After"]) == (429, "7")
        assert client.get(proxy.uri, timeout=60).status_code == 201
    assert len(written) == 2
    assert proxy.seen == {"Passing": 2, "Answer": 1}


def test_resets_before_or_after_the_server_heard_of_it(proxy: Proxy, written: list[bytes]) -> None:
    with proxy.behaving(Resetting()), pytest.raises(requests.ConnectionError):
        requests.post(proxy.uri, data=b"never", timeout=60)
    with proxy.behaving(LosingReplies()):
        with pytest.raises(requests.ConnectionError):
            requests.post(proxy.uri, data=b"done", timeout=60)
        assert requests.get(proxy.uri, timeout=60).status_code == 201
    assert written == [b"done", b""]


def test_hangs_until_the_client_has_had_enough(proxy: Proxy, written: list[bytes]) -> None:
    with proxy.behaving(Hanging()), pytest.raises(requests.Timeout):
        requests.get(proxy.uri, timeout=0.3)
    assert requests.get(proxy.uri, timeout=60).status_code == 201
    assert len(written) == 1
