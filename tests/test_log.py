"""Log lines as they are read: on a terminal, by a machine, without secrets, and where nothing can be written."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator

import pytest

from ray_tracking import log as logging

log = logging.get_logger()


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(logging.JSON_VARIABLE, "0")
    yield
    os.environ[logging.JSON_VARIABLE] = "0"
    logging.configure()
    logging._Settings.configured = False


def test_a_line_with_what_is_bound(capsys: pytest.CaptureFixture[str]) -> None:
    logging.configure("info", run="r1", rank=0)
    logging.bind(attempt=2)
    log.info("restored", step=7)
    log.debug("not shown")
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "[info     ] restored" in shown
    for part in ("step=7", "run=r1", "rank=0", "attempt=2"):
        assert part in shown


def test_an_error_with_its_hint_stands_below_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    logging.configure("info")
    log.warning("backend fails", backend="mlflow", error="MLflow does not answer.\nStart the server.", next_try=2)
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.endswith("backend fails backend=mlflow next_try=2")
    assert (second, third) == ("  error: MLflow does not answer.", "  Start the server.")
    log.warning("short", error="gone")
    assert capsys.readouterr().err.splitlines()[0].endswith("short error=gone")


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    logging.configure("debug", json=True, run="r1")
    log.debug("event", error="two\nlines", other=object)
    event = json.loads(capsys.readouterr().err)
    assert (event["event"], event["level"], event["run"], event["error"]) == ("event", "debug", "r1", "two\nlines")
    assert event["timestamp"].endswith("Z")
    assert logging.is_json()
    assert logging.is_debug()


def test_the_variable_wins(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(logging.LEVEL_VARIABLE, "error")
    logging.configure("debug")
    log.warning("not shown")
    log.error("shown")
    assert "not shown" not in capsys.readouterr().err
    assert logging.level_name() == "error"


def test_what_was_configured_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    logging.configure("debug", run="r1")
    logging.configure_once()
    assert logging.level_name() == "debug"
    monkeypatch.setattr(logging._Settings, "configured", False)
    logging.configure_once()
    assert logging.level_name() == "info"


def test_secrets_are_removed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "planted-0123456789")
    logging.configure("info")
    try:
        raise ValueError("https://me:hunter2secret@host/x planted-0123456789")
    except ValueError:
        log.error("failed", exc_info=True, api_key="k-123456789", error="said planted-0123456789 " * 5)
    shown = capsys.readouterr().err
    assert "ValueError" in shown
    for secret in ("planted-0123456789", "hunter2secret", "k-123456789"):
        assert secret not in shown


@pytest.mark.parametrize("stream", [None, "closed"])
def test_a_stderr_that_is_gone_raises_nothing(monkeypatch: pytest.MonkeyPatch, stream: str | None) -> None:
    logging.configure("info")
    gone = io.StringIO()
    gone.close()
    monkeypatch.setattr(sys, "stderr", gone if stream else None)
    log.error("nobody reads this")
