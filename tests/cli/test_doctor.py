from __future__ import annotations

import json

import pytest

from ray_tracking.monitoring import doctor
from ray_tracking.monitoring.findings import Finding, ok, problem, warning
from tests.cli.conftest import Cli


def test_a_machine_without_problems_is_0(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN_PATH", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")
    done = cli("doctor")
    assert done.code == 0, done.out
    assert "0 problems" in done.out
    assert max(map(len, done.out.splitlines())) <= 80


def test_problems_are_1_and_come_with_their_fix(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Finding] = [ok("a", "fine"), warning("b", "so so", "Polish [it]."), problem("c", "broken", "Mend it.")]
    monkeypatch.setattr(doctor, "examine", lambda *_, **__: found)
    done = cli("doctor")
    assert done.code == 1
    assert "Polish [it]." in done.out
    assert "problem: c\n  Mend it.\n" in done.out
    as_json = cli("doctor", "--json")
    assert as_json.code == 1
    assert json.loads(as_json.out) == [
        {"check": "a", "level": "ok", "found": "fine", "fix": None},
        {"check": "b", "level": "warning", "found": "so so", "fix": "Polish [it]."},
        {"check": "c", "level": "problem", "found": "broken", "fix": "Mend it."},
    ]


def test_warnings_alone_are_0(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda *_, **__: [warning("b", "so so", "Polish it.")])
    assert cli("doctor").code == 0


def test_a_broken_config_is_2(cli: Cli) -> None:
    assert cli("doctor", "--set", "seeed=1").code == 2


def test_nothing_at_the_address_is_a_problem(cli: Cli) -> None:
    done = cli("doctor", "--address", "127.0.0.1:1")
    assert done.code == 1
    assert "nothing answers at 127.0.0.1:1" in " ".join(done.out.split())
