"""How far a backend has been filled, and how it is doing: `cursors/<backend>.json` in the run's directory."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum

from ray_tracking.storage import Storage

FOLDER = "cursors"


class BackendState(StrEnum):
    """How delivery to a backend stands."""

    STARTING = "starting"
    OK = "ok"
    FAILING = "failing"  # the last call failed; it is tried again
    HANGING = "hanging"  # a call has not come back within the deadline
    DISABLED = "disabled"  # refused for good: bad credentials, say
    UNAVAILABLE = "unavailable"  # not installed
    COMPLETE = "complete"  # the run has ended and everything was delivered
    PENDING = "pending"  # the run has ended and something was not


@dataclass(slots=True)
class Cursor:
    """`offset` is the next journal row to deliver; `delivered` and `dropped` count rows of all attempts."""

    backend: str
    offset: int = 0
    delivered: int = 0
    dropped: int = 0
    state: BackendState = BackendState.STARTING
    error: str | None = None
    run_id: str | None = None
    location: str | None = None
    unsupported: list[str] = field(default_factory=list)
    """Kinds of record it can't show."""

    def save(self, run: Storage) -> None:
        run.write_bytes(f"{FOLDER}/{self.backend}.json", json.dumps(asdict(self)).encode())

    @classmethod
    def load(cls, run: Storage, backend: str) -> Cursor:
        """The saved cursor, or a new one at the journal's beginning."""
        try:
            values = json.loads(run.read_bytes(f"{FOLDER}/{backend}.json"))
        except FileNotFoundError:
            return cls(backend)
        known = {f.name for f in fields(cls)}
        values = {key: value for key, value in values.items() if key in known}
        return cls(**{**values, "backend": backend, "state": BackendState(values["state"])})

    @classmethod
    def load_all(cls, run: Storage) -> list[Cursor]:
        """The cursors of every backend the run has had, by name."""
        names = (entry.name for entry in run.list(FOLDER))
        return [cls.load(run, name.removesuffix(".json")) for name in names if name.endswith(".json")]
