"""What is said before Ray is asked: it tries for long where nothing answers, and aborts on a token that is missing."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from ray_tracking.errors import UsageError
from ray_tracking.runtime.cluster import _check_answers


def test_nothing_at_the_address_is_said_at_once() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        begun = time.monotonic()
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
            with pytest.raises(UsageError, match=rf"No Ray cluster answers at '{address}'.*\n.*--address"):
                _check_answers(address)
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("address", ["local", "auto", "head"])
def test_addresses_without_a_port_are_left_to_ray(address: str) -> None:
    _check_answers(address)


def test_a_dashboard_is_no_place_to_connect_to() -> None:
    with pytest.raises(UsageError, match=r"head:6379.*submit train"):
        _check_answers("http://head:8265")


def test_a_bad_port_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="No Ray cluster answers"):
        _check_answers("head:70000")


def test_a_token_that_is_asked_for_and_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UsageError, match="RAY_AUTH_MODE is token, but there is none"):
            _check_answers(address)
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
        with pytest.raises(UsageError, match=r"none .*can't be read"):
            _check_answers(address)
