"""Copies of checkpoints that runs have left in this machine's memory, and which of them `gc` takes away."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ray_tracking.checkpoint.nearby_folders import Leftover, leftovers, of_run
from ray_tracking.monitoring.strays import RECENT
from ray_tracking.storage import Storage


@dataclass(frozen=True, slots=True)
class MemoryCopies:
    """Those of one run. `kept`: why they are left alone, None if they may go."""

    leftover: Leftover
    kept: str | None

    def to_json(self) -> dict[str, Any]:
        found = self.leftover
        return {
            "path": str(found.path),
            "directory": found.directory,
            "bytes": found.bytes,
            "kept": self.kept,
            "delete": self.kept is None,
        }


def memory_copies(directories: Iterable[Storage] | None, now: float, *, idle: bool) -> list[MemoryCopies]:
    """Of the runs in these directories; None: of all of this user. `idle`: a person says that no run is coming back."""
    wanted = None if directories is None else {of_run(directory) for directory in directories}
    found = [each for each in leftovers() if wanted is None or each.path in wanted]
    return [MemoryCopies(each, why_kept(each, now, idle=idle)) for each in found]


def why_kept(leftover: Leftover, now: float, *, idle: bool) -> str | None:
    """Why `gc` leaves them alone. Pure."""
    if leftover.in_use:
        return "the run is alive"
    return RECENT if leftover.is_recent(now) and not idle else None
