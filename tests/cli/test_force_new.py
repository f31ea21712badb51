"""`train --run-id ID --force-new`: a new run in any case, never over one that is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_tracking.cli import train
from ray_tracking.runs.record import RunRecord, Status
from ray_tracking.runs.store import RunStore
from tests.cli.conftest import Cli


def test_the_next_free_id_is_taken_and_said(cli: Cli, store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("job.py").write_text("def train(run):\n    pass\n")
    started: list[str | None] = []
    monkeypatch.setattr(train, "_run", lambda target, config, run_id, *_: started.append(run_id))
    store.save(RunRecord("a", "n", 1.0).finish(2.0, Status.COMPLETED, "completed"))
    assert cli("train", "job.py:train", "--run-id", "b", "--force-new").code == 0
    done = cli("train", "job.py:train", "--run-id", "a", "--force-new")
    assert done.code == 0
    assert "There is a run 'a' already; the new one is 'a-2'." in done.err
    cli("train", "job.py:train", "--force-new")
    cli("train", "job.py:train", "--run-id", "a")
    assert started == ["b", "a-2", None, "a"]
    assert store.load("a").status is Status.COMPLETED
