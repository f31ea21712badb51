"""Keeps the state that a trial will take over from retention until it has been.

In the hub: nothing here may import torch, which costs a second and 200 MB.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from ray_tracking.checkpoint import CheckpointStore
from ray_tracking.checkpoint import manifest as names
from ray_tracking.checkpoint.manifest import CheckpointInfo, save_attempt
from ray_tracking.errors import RefusedError, StorageError
from ray_tracking.runs.resuming import is_superseded
from ray_tracking.runs.store import RunStore

_HELD = b"held for "


@dataclass(frozen=True, slots=True)
class Takeover:
    """`number` counts a trial's takeovers from 1; `run_id`: whose state; `reports`: how many it had made by `step`."""

    number: int
    run_id: str
    step: int
    reports: int


def candidates(runs: RunStore, run_id: str, step: int) -> list[CheckpointInfo]:
    """Whole checkpoints of the history of a run that counts: that of `step`, those soon after it, those before it."""
    attempts = runs.load(run_id).attempts
    found = [
        info
        for info in CheckpointStore(runs.directory(run_id)).checkpoints()
        if not is_superseded(save_attempt(info), info.step, attempts)
    ]
    return sorted(found, key=lambda info: (info.step < step, abs(info.step - step)))


def hold(runs: RunStore, takeover: Takeover, by: str) -> None:
    """Keep retention from the state that will be taken over. Does not raise: if it goes, the next one is taken."""
    with suppress(StorageError, RefusedError):
        for info in candidates(runs, takeover.run_id, takeover.step)[:1]:
            if not info.pinned:
                pin = names.join(info.folder, names.PIN_FILE)
                runs.directory(takeover.run_id).write_bytes(pin, _HELD + by.encode() + b"\n")


def release(runs: RunStore, takeover: Takeover, by: str) -> None:
    """End a hold; pins of people stay. Does not raise."""
    directory = runs.directory(takeover.run_id)
    with suppress(StorageError, RefusedError, FileNotFoundError):
        for info in CheckpointStore(directory).checkpoints():
            pin = names.join(info.folder, names.PIN_FILE)
            if info.pinned and directory.read_bytes(pin) == _HELD + by.encode() + b"\n":
                directory.delete(pin)
