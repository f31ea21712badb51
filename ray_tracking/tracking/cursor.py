"""How far a backend has been filled, and how it is doing: `cursors/<backend>.json` in the run's directory."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum

from ray_tracking.log import get_logger
from ray_tracking.storage import Storage
from ray_tracking.tracking.plan import Span

log = get_logger()

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
    spans: list[Span] = field(default_factory=list)
    """Where rows that a later attempt supersedes were left out."""

    def save(self, run: Storage) -> None:
        run.write_bytes(f"{FOLDER}/{self.backend}.json", json.dumps(asdict(self)).encode())

    @classmethod
    def load(cls, run: Storage, backend: str) -> Cursor:
        """The saved cursor; a new one at the journal's beginning if there is none or, loudly, if it is damaged."""
        name = f"{FOLDER}/{backend}.json"
        try:
            values = json.loads(run.read_bytes(name))
            known = {f.name for f in fields(cls)}
            values = {key: value for key, value in values.items() if key in known}
            cursor = cls(**{**values, "backend": backend, "state": BackendState(values["state"])})
            cursor.spans = [Span(*map(int, span)) for span in cursor.spans]
            if not all(type(n) is int and n >= 0 for n in (cursor.offset, cursor.delivered, cursor.dropped)):
                raise ValueError("an offset or count is no whole number")
        except FileNotFoundError:
            return cls(backend)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning(
                "cursor damaged; the backend is filled from the journal's beginning",
                backend=backend,
                path=run.path(name),
                error=f"{type(error).__name__}: {error}",
            )
            return cls(backend)
        return cursor

    @classmethod
    def load_all(cls, run: Storage) -> list[Cursor]:
        """The cursors of every backend the run has had, by name."""
        names = (entry.name for entry in run.list(FOLDER))
        return [cls.load(run, name.removesuffix(".json")) for name in names if name.endswith(".json")]
