"""What the journal's tests share: records, and storages local and on S3."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_tracking.storage import Storage
from tests.s3 import s3_server, s3_uri

__all__ = ["s3_server", "s3_uri"]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(tmp_path / "runs" / "run-1")


@pytest.fixture(params=["local", "s3"])
def any_storage(request: pytest.FixtureRequest) -> Storage:
    if request.param == "local":
        return request.getfixturevalue("storage")
    return Storage.open(request.getfixturevalue("s3_uri"))


@pytest.fixture
def small_tiers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merges after three segments, so that a short test has many."""
    monkeypatch.setattr("ray_tracking.journal.segments.FAN_OUT", 3)
