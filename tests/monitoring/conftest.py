from __future__ import annotations

from pathlib import Path

import pytest

from ray_tracking.runs.store import RunStore
from ray_tracking.storage import Storage


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(Storage.open(tmp_path / "runs"))
