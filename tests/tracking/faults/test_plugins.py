"""A backend that breaks at import, at open, at log or at close harms neither the run nor the other backends."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ray_tracking.records import Record
from ray_tracking.tracking import service as service_module
from ray_tracking.tracking.backends.base import BackendIdentity, RunInfo
from ray_tracking.tracking.cursor import BackendState
from tests.readback import comparable
from tests.tracking.fakes import FakeBackend, shown
from tests.tracking.faults.conftest import Track, journaled


class Broken(FakeBackend):
    """`at`: where it breaks, each time anew."""

    def __init__(self, name: str, at: str, breaks: Callable[[], object]) -> None:
        super().__init__(name)
        self.at = at
        self.breaks = breaks

    def _perhaps(self, here: str) -> None:
        if here == self.at:
            self.breaks()

    def open(self, run: RunInfo, identity: BackendIdentity | None) -> BackendIdentity:
        self._perhaps("open")
        return super().open(run, identity)

    def position(self) -> int | None:
        self._perhaps("position")
        return None

    def write(self, records: Sequence[Record]) -> None:
        self._perhaps("write")
        super().write(records)

    def flush(self) -> None:
        self._perhaps("flush")

    def close(self, status: str) -> None:
        self._perhaps("close")
        super().close(status)


def throw(error: BaseException) -> Callable[[], object]:
    def raises() -> object:
        raise error

    return raises


@pytest.fixture
def import_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], object]:
    """A package that raises when it is imported."""
    (tmp_path / "broken_plugin.py").write_text("raise RuntimeError('made for another Python')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return lambda: importlib.import_module("broken_plugin")


def test_each_is_isolated(
    track: Track,
    import_broken: Callable[[], object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong: dict[str, tuple[str, Any]] = {
        "import": ("open", import_broken),
        "open": ("open", throw(KeyError("config"))),
        "position": ("position", throw(ValueError("odd"))),
        "log": ("write", throw(RuntimeError("can't log"))),
        "exit": ("write", throw(SystemExit(1))),
        "memory": ("write", throw(MemoryError())),
        "close": ("close", throw(OSError("lost"))),
        "flush": ("flush", throw(OSError("full"))),
    }
    good = FakeBackend("good")
    backends = [*(Broken(name, *how) for name, how in wrong.items()), good]
    monkeypatch.setattr(service_module, "create_backends", lambda _: backends)
    monkeypatch.setattr("ray_tracking.tracking.patience.LAST_PAUSE_SECONDS", 0.01)
    run = track({"delivery": {"final_secs": 10}})
    run.log(20)
    run.wait_delivered("good")
    for name in ("import", "open", "position", "log", "exit", "memory"):
        run.wait_for(BackendState.FAILING, backend=name)
    run.log(20)
    report = run.close()
    assert report.pop("good")["state"] == "complete"
    assert comparable(shown(good)) == journaled(run)
    assert {name: backend["state"] for name, backend in report.items()} == dict.fromkeys(wrong, "pending")
    assert [name for name, backend in report.items() if backend["pending"] == 0] == ["close", "flush"]
    assert report["import"]["error"] == "RuntimeError: made for another Python"
    said = capsys.readouterr().err
    for name in wrong:
        assert sum("backend fails" in line and f"backend={name}" in line for line in said.splitlines()) <= 1
