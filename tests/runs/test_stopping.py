from __future__ import annotations

import time
from pathlib import Path

from ray_tracking.runs import stopping
from ray_tracking.storage import Storage


def test_a_request_is_seen_until_it_is_cleared(tmp_path: Path) -> None:
    run = Storage.open(tmp_path / "run")
    assert stopping.requested(run) is None  # the directory is not even there
    stopping.clear(run, time.time())
    made = stopping.request(run)
    assert stopping.requested(Storage.open(tmp_path / "run")) == made
    assert abs(made.asked - time.time()) < 60
    stopping.clear(run, made.asked + 1)
    assert stopping.requested(run) is None


def test_what_was_asked_since_the_start_began_is_not_cleared_by_it(tmp_path: Path) -> None:
    run = Storage.open(tmp_path)
    made = stopping.request(run)
    stopping.clear(run, made.asked - 1)
    assert stopping.requested(run) == made


def test_what_cannot_be_read_is_a_request_all_the_same(tmp_path: Path) -> None:
    run = Storage.open(tmp_path)
    for damaged in (b"", b"{", b"[]", b'{"asked": "x", "by": 1}'):
        run.write_bytes(stopping.NAME, damaged)
        found = stopping.requested(run)
        assert found is not None
        assert found.by == "unknown"


def test_object_stores_are_asked_less_often(tmp_path: Path) -> None:
    from pyarrow import fs

    local = Storage.open(tmp_path)
    remote = Storage(fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "run", "mock://run")
    assert stopping.poll_seconds(local) < stopping.poll_seconds(remote) <= 5
