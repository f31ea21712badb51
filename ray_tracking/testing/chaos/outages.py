"""What is taken away from a run for a while, and given back: a backend's server or folder, the space on its disk.

In: the run's directory and what chaos has set up. Out: an `Outage` that begins, ends, and says whether it was felt.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from ray_tracking.errors import StorageError
from ray_tracking.storage import Storage
from ray_tracking.testing.chaos.plan import Part
from ray_tracking.testing.chaos.processes import Process, await_end
from ray_tracking.testing.chaos.server import MLflowServer
from ray_tracking.testing.chaos.tmpfs import Tmpfs
from ray_tracking.tracking.cursor import BackendState, Cursor

_FELT = frozenset({BackendState.FAILING, BackendState.HANGING, BackendState.PENDING})

Find = Callable[[Part], list[Process]]
Printed = Callable[[], str]
"""All that the run's command has printed so far."""


class Outage(Protocol):
    """`begin` and `end` may be called once each."""

    def begin(self) -> list[int]:
        """Take it away. Returns the ids of processes that were killed for it."""

    def end(self) -> None:
        """Give it back as it was."""

    def felt(self) -> str | None:
        """How the run shows that it is away, None while it does not."""


class ServerOutage:
    """MLflow's server is killed, and started again on the same port and database."""

    def __init__(self, server: MLflowServer, directory: Storage) -> None:
        self._server = server
        self._directory = directory

    def begin(self) -> list[int]:
        return self._server.kill()

    def end(self) -> None:
        self._server.start()

    def felt(self) -> str | None:
        return _state(self._directory, Part.MLFLOW)


class FolderOutage:
    """A backend's folder is away and a file stands in its place: nothing can be made in it, by root neither.

    What its client has open could still be written, so `service`, if it has one, is killed.
    """

    def __init__(self, backend: Part, folder: Path, directory: Storage, find: Find) -> None:
        self._backend = backend
        self._folder = folder
        self._aside = folder.with_name(f"{folder.name}.away")
        self._directory = directory
        self._find = find

    def begin(self) -> list[int]:
        os.rename(self._folder, self._aside)
        self._folder.touch()
        services = self._find(self._backend)
        for service in services:
            service.send(signal.SIGKILL)
        await_end(services)
        return [service.pid for service in services]

    def end(self) -> None:
        self._folder.unlink()
        os.rename(self._aside, self._folder)

    def felt(self) -> str | None:
        return _state(self._directory, self._backend)


class FullDisk:
    """The run's storage has no space left. Felt as soon as the run's command says so."""

    def __init__(self, disk: Tmpfs, printed: Printed) -> None:
        self._disk = disk
        self._printed = printed
        self._before = 0

    def begin(self) -> list[int]:
        self._before = len(self._printed())
        self._disk.fill()
        return []

    def end(self) -> None:
        self._disk.free()

    def felt(self) -> str | None:
        said = os.strerror(errno.ENOSPC)
        return said if said in self._printed()[self._before :] else None


def folder_of(directory: Storage, backend: Part) -> Path | None:
    """Where a backend keeps its files of the run, as its cursor says; None while it has none."""
    location = Cursor.load(directory, backend.value).location
    return Path(location) if location and Path(location).is_dir() else None


def _state(directory: Storage, backend: Part) -> str | None:
    try:
        cursor = Cursor.load(directory, backend.value)
    except StorageError:
        return None  # it is being replaced just now
    return cursor.state.value if cursor.state in _FELT else None
