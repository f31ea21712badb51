from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from ray_tracking.cli.app import main
from ray_tracking.runs.store import RunStore
from ray_tracking.storage import Storage


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Outcome]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunStore:
    """The runs below the storage that commands use when none is named."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_TRACKING_STORAGE", str(tmp_path / "runs"))
    return RunStore(Storage.open(tmp_path / "runs"))


@pytest.fixture
def cli(store: RunStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """The program with these arguments, in this process: exit status, stdout, stderr. 80 columns, no colour."""

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["ray-tracking", *arguments])
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setenv("NO_COLOR", "1")
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int | None)
        return Outcome(ended.value.code or 0, captured.out, captured.err)

    return run
