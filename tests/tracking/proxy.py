"""A proxy before an HTTP server that misbehaves as told, from one request to the next."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

_NOT_PASSED_ON = frozenset({"connection", "content-length", "host", "keep-alive", "transfer-encoding"})
_SERVER_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Answer:
    """Instead of the server's: a status, and headers."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Passing:
    """To the server and back, `delay` seconds later. If the server is not there: an error 502."""

    delay: float = 0.0


class Hanging:
    """The request is taken, and nothing comes back while it lasts."""


class Resetting:
    """The connection is reset (RST) before the server hears of the request."""


class LosingReplies:
    """The server does what was asked; its answer is lost and the connection reset. Only of requests that write."""


Mode = Answer | Passing | Hanging | Resetting | LosingReplies


class Proxy:
    """In a `with` block. `mode` may be changed at any time and holds for the requests that come after."""

    def __init__(self, upstream: str) -> None:
        self.mode: Mode = Passing()
        self.seen: Counter[str] = Counter()
        """Requests by the name of the mode they met."""
        self.times: list[float] = []
        """When each came, monotonic seconds."""
        self.released = threading.Event()
        """Ends every hanging."""
        parts = urlsplit(upstream)
        assert parts.hostname is not None
        assert parts.port is not None
        self.upstream = (parts.hostname, parts.port)
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    @contextlib.contextmanager
    def behaving(self, mode: Mode) -> Iterator[None]:
        """In this mode for the block, then passing again."""
        self.mode = mode
        try:
            yield
        finally:
            self.mode = Passing()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, *_: object) -> None:
        """A client that has gone away is no error of the tests."""


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        proxy, mode = self.proxy, self.proxy.mode
        proxy.seen[type(mode).__name__] += 1
        proxy.times.append(time.monotonic())
        if isinstance(mode, Hanging):
            while proxy.mode is mode and not proxy.released.wait(0.05):
                pass
            self._reset()
        elif isinstance(mode, Resetting):
            self._reset()
        elif isinstance(mode, Answer):
            text = json.dumps({"error_code": "", "message": f"The proxy answers {mode.status}."}).encode()
            self._answer(mode.status, mode.headers, text)
        elif isinstance(mode, LosingReplies):
            answer = self._ask(body)
            if self.command == "GET":
                self._answer(*answer)
            else:
                self._reset()
        else:
            proxy.released.wait(mode.delay)
            self._answer(*self._ask(body))

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle  # noqa: N815

    def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _NOT_PASSED_ON}
        try:
            server = http.client.HTTPConnection(*self.proxy.upstream, timeout=_SERVER_SECONDS)
            with contextlib.closing(server):
                server.request(self.command, self.path, body=body or None, headers=headers)
                answer = server.getresponse()
                return answer.status, dict(answer.getheaders()), answer.read()
        except OSError as error:
            return 502, {}, str(error).encode()

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in _NOT_PASSED_ON:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass
