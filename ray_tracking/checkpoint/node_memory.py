"""How much memory this node, or the container we are in, still has for files in shared memory. Linux; no torch.

In: a folder there. Out: `NodeMemory`, and whether something has room in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_KEPT_FREE = 0.1
"""The share of all memory that is left alone. Ray ends workers when 95 % of it is used."""
_NO_LIMIT = 1 << 60
"""What version 1 of cgroups says instead of "none" is above it."""
_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class NodeMemory:
    """In bytes. `free`: what the folder's file system takes; `available`: what processes can still have; of `total`."""

    free: int
    available: int
    total: int

    def has_room(self, size: int, reserved: int = 0) -> bool:
        """Whether `size` more bytes leave enough. `reserved`: what others have a claim to on the file system."""
        return size <= self.free - reserved and size <= self.available - _KEPT_FREE * self.total


def look(folder: str, *, proc: Path = _PROC, cgroups: Path = _CGROUPS) -> NodeMemory:
    """As it is now. Raises OSError where the system does not tell."""
    status = os.statvfs(folder)
    machine = _table(proc / "meminfo", unit=1024)
    available, total = machine["MemAvailable:"], machine["MemTotal:"]
    for limit, used in _limits(proc, cgroups):
        available, total = min(available, limit - used), min(total, limit)
    return NodeMemory(status.f_bavail * status.f_frsize, available, total)


def _limits(proc: Path, cgroups: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of the control groups we are in that have a limit. Caches of files don't count as used."""
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        _, kinds, place = line.split(":", 2)
        if "memory" in kinds.split(","):
            yield from _groups(cgroups / "memory", place, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        elif not kinds:
            yield from _groups(cgroups, place, "memory.max", "memory.current", "")


def _groups(root: Path, place: str, limit: str, usage: str, prefix: str) -> Iterator[tuple[int, int]]:
    """A group and those above it. Inside a container `place` may be where the group is called so outside of it."""
    folder = root / place.strip("/")
    for group in (folder, *folder.parents) if folder.is_dir() else (root,):
        if not group.is_relative_to(root):
            break
        try:
            most = (group / limit).read_text().strip()
            used = int((group / usage).read_text())
            cached = _table(group / "memory.stat")
        except (FileNotFoundError, PermissionError):
            continue  # the topmost group has no limit
        if most != "max" and int(most) < _NO_LIMIT:
            yield int(most), used - cached[f"{prefix}inactive_file"] - cached[f"{prefix}active_file"]


def _table(path: Path, unit: int = 1) -> Mapping[str, int]:
    """Lines of a name and a number."""
    return {name: int(number) * unit for name, number, *_ in map(str.split, path.read_text().splitlines())}
