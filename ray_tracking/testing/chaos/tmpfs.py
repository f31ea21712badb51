"""A disk of chosen size in memory, which can be full without being filled: its size is cut down to what lies on it."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from ray_tracking.errors import RayTrackingError, RefusedError

_TRIES = 20


class Tmpfs:
    """Mounted on `folder` by `mount`. Needs root in the machine or container."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def mount(self) -> None:
        """Raises RefusedError if this process may not."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _call("mount", "-t", "tmpfs", "-o", "size=50%", "ray-tracking-chaos", str(self.folder))

    def fill(self) -> None:
        """From now on nothing more fits on it."""
        for _ in range(_TRIES):  # it can't become smaller than what was written meanwhile
            try:
                return self._resize(str(self._used()))
            except RefusedError as error:
                refused = error
        raise refused

    def free(self) -> None:
        self._resize("50%")

    def unmount(self) -> None:
        """Even if a process still has files on it open."""
        _call("umount", "-l", str(self.folder))

    @property
    def left(self) -> int:
        """Bytes that fit on it."""
        status = os.statvfs(self.folder)
        return status.f_bavail * status.f_frsize

    def _used(self) -> int:
        status = os.statvfs(self.folder)
        return (status.f_blocks - status.f_bfree) * status.f_frsize

    def _resize(self, size: str) -> None:
        _call("mount", "-o", f"remount,size={size}", str(self.folder))


def why_no_tmpfs() -> str | None:
    """Why this process can't mount one; None if it can: tried."""
    with tempfile.TemporaryDirectory(prefix="ray-tracking-chaos-") as folder:
        try:
            disk = Tmpfs(Path(folder))
            disk.mount()
            disk.unmount()
        except RayTrackingError as error:
            return error.message
    return None


def _call(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise RefusedError(f"`{command[0]}` can't be run: {error}") from error
    if done.returncode != 0:
        raise RefusedError(f"`{' '.join(command)}` was refused: {done.stderr.strip() or done.returncode}")
