"""Whether W&B's service writes what it is sent: it says nothing when its disk is full, and never tries again.

In: an offline run's folder, journal offsets of the rows sent. Out: yes, or a BackendError for a folder that takes none.
"""

from __future__ import annotations

import os
import secrets

from ray_tracking.errors import BackendError
from ray_tracking.tracking.backends.wandb_rows import held_offset, run_files

_HINT = "Check that the folder is writable and has space."
_PROBE_BYTES = 1 << 16


class FileWatch:
    """Asked every few seconds, longer than the service keeps rows to itself. Reads the file only if it did not grow."""

    def __init__(self, folder: str, run_id: str) -> None:
        self._folder = folder
        self._run_id = run_id
        self._verified = -1
        self._before = (-1, -1)

    def is_written(self, sent: int) -> bool:
        """Whether rows sent before the last call are in the file now. `sent`: journal offset of the last one."""
        (sent_before, size_before), size = self._before, self._size()
        self._before = (sent, size)
        if size != size_before or sent_before <= self._verified:
            return True
        held = held_offset(self._folder, self._run_id)
        self._verified = -1 if held is None else held
        return self._verified >= sent_before

    def _size(self) -> int:
        return sum(map(os.path.getsize, run_files(self._folder, self._run_id)))


def check_writable(folder: str) -> None:
    """Raises BackendError if nothing can be written: `wandb.init` would go to another folder without a word."""
    probe = os.path.join(folder, f".{secrets.token_hex(8)}")
    try:
        os.makedirs(folder, exist_ok=True)
        try:
            with open(probe, "wb") as file:
                file.write(bytes(_PROBE_BYTES))
        finally:
            if os.path.exists(probe):
                os.unlink(probe)
    except OSError as error:
        raise BackendError(f"W&B's files in {folder!r} can't be written: {error}", hint=_HINT) from error


def stopped(folder: str) -> BackendError:
    return BackendError(f"W&B no longer writes its files in {folder!r}, as on a full disk.", hint=_HINT)
