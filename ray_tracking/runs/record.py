"""What `run.json` holds: the identity of a run and the history of its attempts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from typing import Any

from ray_tracking.errors import RayTrackingError

SCHEMA = 1


class Status(StrEnum):
    """How a run stands. `interrupted` is what readers call a run that says `running` but shows no sign of life."""

    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    ABORTED = "aborted"
    INTERRUPTED = "interrupted"

    @property
    def is_final(self) -> bool:
        return self not in (Status.RUNNING, Status.INTERRUPTED)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of the worker group. Times are Unix seconds; `resumed_from_step` is -1 for a fresh start."""

    number: int
    started: float
    world_size: int
    ended: float | None = None
    reason: str | None = None
    """Why it ended: `completed`, or the error's first line."""
    resumed_from_step: int | None = None
    """None until the workers have said what they restored."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The whole of `run.json`. `config` has its secrets removed before it comes here."""

    run_id: str
    name: str
    created: float
    status: Status = Status.RUNNING
    ended: float | None = None
    entrypoint: str | None = None
    code_digest: str | None = None
    monitor: str | None = None
    mode: str = "min"
    config: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    attempts: tuple[Attempt, ...] = ()
    schema: int = SCHEMA

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1, default=str, sort_keys=False).encode()

    @classmethod
    def from_json(cls, data: bytes, source: str) -> RunRecord:
        """Raises RayTrackingError naming `source` if it is no run.json, or one of a newer schema."""
        try:
            values = json.loads(data)
            if int(values["schema"]) > SCHEMA:
                raise RayTrackingError(
                    f"{source} was written by a newer version "
                    f"(schema {values['schema']}; this one reads up to {SCHEMA}).",
                    hint="Upgrade ray-tracking.",
                )
            values["status"] = Status(values["status"])
            values["attempts"] = tuple(Attempt(**_known(Attempt, attempt)) for attempt in values["attempts"])
            return cls(**_known(cls, values))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RayTrackingError(
                f"{source} is damaged: {type(error).__name__}: {error}",
                hint="Restore the file from a backup, or move the run's folder away.",
            ) from error

    def begin_attempt(self, now: float, world_size: int) -> RunRecord:
        """The record with one more attempt; an attempt still open is ended as interrupted."""
        closed = self._close_open_attempt(now, "interrupted")
        number = closed.attempts[-1].number + 1 if closed.attempts else 1
        attempt = Attempt(number, now, world_size)
        return replace(closed, attempts=(*closed.attempts, attempt), status=Status.RUNNING, ended=None)

    def resumed(self, number: int, step: int) -> RunRecord:
        """The record with what attempt `number` resumed from."""
        attempts = tuple(
            replace(attempt, resumed_from_step=step) if attempt.number == number else attempt
            for attempt in self.attempts
        )
        return replace(self, attempts=attempts)

    def end_attempt(self, now: float, reason: str) -> RunRecord:
        """The record with the open attempt ended; the run goes on, or not."""
        return self._close_open_attempt(now, reason)

    def finish(self, now: float, status: Status, reason: str) -> RunRecord:
        return replace(self._close_open_attempt(now, reason), status=status, ended=now)

    def _close_open_attempt(self, now: float, reason: str) -> RunRecord:
        attempts = tuple(
            attempt if attempt.ended is not None else replace(attempt, ended=now, reason=reason)
            for attempt in self.attempts
        )
        return replace(self, attempts=attempts)


def _known(kind: type[Attempt] | type[RunRecord], values: Mapping[str, Any]) -> dict[str, Any]:
    """Only the fields that this version has."""
    names = {f.name for f in fields(kind)}
    return {key: value for key, value in values.items() if key in names}
