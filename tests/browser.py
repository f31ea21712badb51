"""Chromium as a reader of our pages, spoken to through its DevTools pipe: no driver, no port, no network.

In: a page on disk. Out: what it shows, what it complained about, what it asked the network for.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EXECUTABLE = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_SECONDS = 120.0
_LAUNCH = """
import fcntl, os, sys
pipes = [fcntl.fcntl(int(each), fcntl.F_DUPFD, 10) for each in sys.argv[1:3]]
os.dup2(pipes[0], 3), os.dup2(pipes[1], 4)  # where the browser looks for them
os.execvp(sys.argv[3], sys.argv[3:])
"""


class Page:
    """`complaints`: console messages of a warning or worse, uncaught exceptions, what the policy refused.
    `requests`: URLs asked for beside the page itself."""

    def __init__(self, send: int, receive: int) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._send, self._receive = send, receive
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self._url = ""
        self._there = False
        self._loaded = False

    def open(self, path: Path) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Network", "Page"):
            self.call(f"{domain}.enable")
        self._url = path.resolve().as_uri()
        self.call("Page.navigate", url=self._url)
        end = time.monotonic() + _SECONDS
        while not self._loaded and time.monotonic() < end:
            self._take(1.0)
        assert self._loaded, "the page did not load"

    def wait(self, expression: str) -> Any:
        """Until the expression is something."""
        end = time.monotonic() + _SECONDS
        while time.monotonic() < end:
            found = self.evaluate(expression)
            if found:
                return found
            time.sleep(0.05)
        raise AssertionError(f"never true: {expression}; {self.complaints}")

    def evaluate(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def call(self, method: str, **params: Any) -> Any:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + _SECONDS
        while time.monotonic() < end:
            found = self._take(1.0)
            if found is not None and found.get("id") == self._number:
                assert "error" not in found, found["error"]
                return found["result"]
        raise AssertionError(f"no answer to {method}")

    def _take(self, timeout: float) -> dict[str, Any] | None:
        """One message; None if there was none in time. Events are noted."""
        while b"\0" not in self._buffer:
            if not select.select([self._receive], [], [], timeout)[0]:
                return None
            data = os.read(self._receive, 1 << 20)
            assert data, "the browser ended"
            self._buffer += data
        raw, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, event: str, found: dict[str, Any]) -> None:
        if event == "Page.frameNavigated":
            self._there = self._there or found["frame"]["url"] == self._url
        elif event == "Page.loadEventFired":
            self._loaded = self._there  # of about:blank, which is there first, it may come late
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(found["exceptionDetails"])[:500])
        elif event == "Runtime.consoleAPICalled" and found["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(found["args"])[:500])
        elif event == "Log.entryAdded" and found["entry"]["level"] in ("error", "warning"):
            self.complaints.append(found["entry"]["text"])
        elif event == "Network.requestWillBeSent":
            url = found["request"]["url"]
            if url != self._url and not url.startswith("data:"):
                self.requests.append(url)


@contextmanager
def browser(path: Path, *options: str, width: int = 1280, height: int = 1600) -> Iterator[Page]:
    """The page opened in a browser of its own."""
    assert EXECUTABLE is not None
    to_us, from_browser = os.pipe()
    to_browser, from_us = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            EXECUTABLE, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions",
            "--disable-background-networking", "--remote-debugging-pipe", f"--user-data-dir={profile}",
            f"--window-size={width},{height}", *options,
        ]  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, str(to_browser), str(from_browser), *command],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_browser)
        os.close(from_browser)
        page = Page(from_us, to_us)
        try:
            page.open(path)
            yield page
        finally:
            os.close(from_us)  # it ends when its pipe does
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
            os.close(to_us)
