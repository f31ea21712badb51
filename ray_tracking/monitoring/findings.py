"""What a check of the set-up found, and how to put it right. In: nothing. Out: the type. Imports nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum


class Level(StrEnum):
    OK = "ok"
    WARNING = "warning"  # works, but not as well or as safely as it should
    PROBLEM = "problem"  # does not work


@dataclass(frozen=True, slots=True)
class Finding:
    """One check's outcome: `found` is what is there, `fix` the command or key that puts it right."""

    check: str
    level: Level
    found: str
    fix: str | None = None

    def to_json(self) -> dict[str, str | None]:
        return asdict(self)


def ok(check: str, found: str) -> Finding:
    return Finding(check, Level.OK, found)


def warning(check: str, found: str, fix: str) -> Finding:
    return Finding(check, Level.WARNING, found, fix)


def problem(check: str, found: str, fix: str) -> Finding:
    return Finding(check, Level.PROBLEM, found, fix)
