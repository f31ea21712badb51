from __future__ import annotations

from pathlib import Path

import pytest

from ray_tracking.errors import UsageError
from ray_tracking.runtime.jobs.access import find_token, jobs_address


def test_the_order_in_which_an_address_is_looked_for() -> None:
    both = {"RAY_API_SERVER_ADDRESS": "http://api:1", "RAY_ADDRESS": "http://ray:1"}
    assert jobs_address("https://given:8265/", both) == "https://given:8265"
    assert jobs_address(None, both) == "http://api:1"
    assert jobs_address(None, {"RAY_ADDRESS": "http://ray:1"}) == "http://ray:1"


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ray://head:10001", "http://head:8265"),
        ("head:6379", "http://head:8265"),
        ("head", "http://head:8265"),
        ("10.0.0.1:9000", "http://10.0.0.1:9000"),
        ("auto", "http://127.0.0.1:8265"),
        ("local", "http://127.0.0.1:8265"),
        ("ftp://head", "ftp://"),
        ("http://", "no host"),
        ("http://head:port", "port"),
    ],
)
def test_other_addresses_are_explained(address: str, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        jobs_address(address, {})
    assert "--address" in str(raised.value)
    assert said in str(raised.value)
    assert address in str(raised.value)


def test_a_variable_is_named_when_it_is_the_one_that_is_wrong() -> None:
    with pytest.raises(UsageError, match=r"RAY_ADDRESS is 'head:6379'.*\n.*--address counts first"):
        jobs_address(None, {"RAY_ADDRESS": "head:6379"})
    with pytest.raises(UsageError, match="No address was given"):
        jobs_address(None, {})


def test_a_password_in_an_address_is_not_shown() -> None:
    with pytest.raises(UsageError) as raised:
        jobs_address("ray://me:hunter2@head:1", {})
    assert "hunter2" not in str(raised.value)


def test_where_the_token_comes_from(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    assert find_token(home).value is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("default\n")
    (tmp_path / "other").write_text(" file ")
    token = find_token(home)
    assert (token.value, token.headers) == ("default", {"Authorization": "Bearer default"})
    assert "default" not in repr(token).replace(".ray", "")
    by_path = {**home, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "other")}
    assert find_token(by_path).value == "file"
    assert find_token({**by_path, "RAY_AUTH_TOKEN": "direct"}).value == "direct"
    disabled = find_token({**by_path, "RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "direct"})
    assert (disabled.value, disabled.headers) == (None, {})
    assert "RAY_AUTH_MODE" in disabled.source


def test_a_token_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="RAY_AUTH_TOKEN_PATH"):
        find_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")})
