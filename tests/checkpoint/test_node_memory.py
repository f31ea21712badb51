"""How much memory is left: read from files as Linux writes them, with and without limits of a container."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from ray_tracking.checkpoint.node_memory import NodeMemory, look

MIB = 1 << 20


@pytest.mark.parametrize(
    ("free", "available", "size", "reserved", "fits"),
    [
        (100, 1000, 100, 0, True),
        (99, 1000, 100, 0, False),  # the file system is too full
        (150, 1000, 100, 51, False),  # what is free there is another's
        (100, 200, 100, 0, True),
        (100, 199, 100, 0, False),  # a tenth of all memory stays
        (0, 1000, 0, 0, True),
    ],
)
def test_has_room(free: int, available: int, size: int, reserved: int, fits: bool) -> None:
    assert NodeMemory(free, available, total=1000).has_room(size, reserved) is fits


def write(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def proc(root: Path, cgroup: str) -> Path:
    meminfo = "MemTotal:       1048576 kB\nMemFree:   100 kB\nMemAvailable:    524288 kB\nHugePages_Total:       0\n"
    return write(root / "proc", {"meminfo": meminfo, "self/cgroup": cgroup})


def stat(inactive: int, active: int = 0, prefix: str = "") -> str:
    return f"shmem 7\n{prefix}inactive_file {inactive * MIB}\n{prefix}active_file {active * MIB}\n"


def test_a_machine_without_containers(tmp_path: Path) -> None:
    found = look(str(tmp_path), proc=proc(tmp_path, "0::/user.slice\n"), cgroups=tmp_path / "none")
    status = os.statvfs(tmp_path)
    assert (found.available, found.total) == (512 * MIB, 1024 * MIB)
    assert abs(found.free - status.f_bavail * status.f_frsize) < 512 * MIB  # others use the disk meanwhile


@pytest.mark.parametrize("place", ["/", "/outside/of/the/container"])
def test_inside_a_container(tmp_path: Path, place: str) -> None:
    """Caches of files can be given back, files in shared memory can't."""
    group = {
        "memory.max": str(400 * MIB),
        "memory.current": str(300 * MIB),
        "memory.stat": stat(50, 20),
    }
    found = look(str(tmp_path), proc=proc(tmp_path, f"0::{place}\n"), cgroups=write(tmp_path / "cgroup", group))
    assert (found.available, found.total) == (170 * MIB, 400 * MIB)


def test_the_tightest_of_the_groups_counts(tmp_path: Path) -> None:
    groups = {
        "pod/memory.max": str(200 * MIB),
        "pod/memory.current": str(190 * MIB),
        "pod/memory.stat": stat(0),
        "pod/main/memory.max": "max",
        "pod/main/memory.current": str(10 * MIB),
        "pod/main/memory.stat": stat(0),
    }
    found = look(str(tmp_path), proc=proc(tmp_path, "0::/pod/main\n"), cgroups=write(tmp_path / "cgroup", groups))
    assert (found.available, found.total) == (10 * MIB, 200 * MIB)


def test_the_older_kind_of_groups(tmp_path: Path) -> None:
    groups = {
        "memory/memory.limit_in_bytes": str(9223372036854771712),
        "memory/memory.usage_in_bytes": str(900 * MIB),
        "memory/memory.stat": stat(0, prefix="total_"),
        "memory/docker/memory.limit_in_bytes": str(300 * MIB),
        "memory/docker/memory.usage_in_bytes": str(250 * MIB),
        "memory/docker/memory.stat": stat(100, prefix="total_"),
    }
    cgroup = "9:name=systemd:/docker\n4:memory:/docker\n0::/docker\n"
    found = look(str(tmp_path), proc=proc(tmp_path, cgroup), cgroups=write(tmp_path / "cgroup", groups))
    assert (found.available, found.total) == (150 * MIB, 300 * MIB)


def test_this_machine() -> None:
    found = look("/")
    assert 0 < found.available <= found.total
