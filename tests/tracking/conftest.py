"""Quick delivery, and a journal to deliver from."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tracking.fakes import Journal


@pytest.fixture(autouse=True)
def _collector() -> Iterator[None]:
    """A tracker changes the garbage collector of its process, which here is the tests'."""
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Delivery without its second-long pauses; retries after 10 ms."""
    monkeypatch.setattr("ray_tracking.tracking.delivery._PAUSE_SECONDS", 0.01)
    monkeypatch.setattr("ray_tracking.tracking.patience.LAST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr("ray_tracking.tracking.delivery._SAVE_SECONDS", 0.05)
    monkeypatch.setattr("ray_tracking.tracking.patience.retry_wait", lambda failures, retry_after: retry_after or 0.01)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "run-1")
