"""A request to end a run early: a small file in its directory, seen by its tracker on whatever host that is.

In: a run's directory. Out: whether somebody asks. Neither Ray nor a signal is needed; only storage is shared.
"""

from __future__ import annotations

import getpass
import json
import socket
import time
from dataclasses import asdict, dataclass

from ray_tracking.storage import Storage

NAME = "stop"
_LOCAL_SECONDS = 1.0
_REMOTE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class StopRequest:
    """`asked`: Unix seconds of the asking host's clock, 0 if the file can't be read; `by`: user and host."""

    asked: float
    by: str


def request(run: Storage) -> StopRequest:
    """Ask the run to save a checkpoint and end. Raises StorageError."""
    made = StopRequest(time.time(), _asker())
    run.write_bytes(NAME, json.dumps(asdict(made)).encode())
    return made


def requested(run: Storage) -> StopRequest | None:
    """The request, None if there is none. One that can't be read is a request all the same. Raises StorageError."""
    try:
        data = run.read_bytes(NAME)
    except FileNotFoundError:
        return None
    try:
        found = json.loads(data)
        return StopRequest(float(found["asked"]), str(found["by"]))
    except (ValueError, KeyError, TypeError):
        return StopRequest(0.0, "unknown")


def clear(run: Storage, before: float) -> None:
    """Remove a request of before a start: whoever starts the run means it to go on. Raises StorageError.

    One asked since `before` (Unix seconds, when that start began) is meant for it, and stays.
    """
    found = requested(run)
    if found is not None and found.asked < before:
        run.delete(NAME)


def poll_seconds(run: Storage) -> float:
    """How often to look: each look at an object store is a request that costs time and money."""
    return _LOCAL_SECONDS if run.is_local else _REMOTE_SECONDS


def _asker() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = "somebody"
    return f"{user} on {socket.gethostname()}"
