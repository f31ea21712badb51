"""Which checkpoint rules can't stand together: one definition, for configuration files and strategies. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

LIMIT_BY_DEFAULT = 3
"""save_total_limit where nobody says otherwise. Beside keep_last or keep_best it counts as not set: a user's own 3
can't be told from the packaged one."""

_WAYS_TO_SAVE = (
    "save_steps",
    "save_every_seconds",
    "save_on_epoch_end",
    "save_on_preemption",
    "save_on_exception",
    "save_at_end",
)


class Contradiction(NamedTuple):
    """`found`: the keys that don't go together, with their values; `allowed`: what would."""

    found: Mapping[str, Any]
    allowed: str


def contradictions(rules: Mapping[str, Any]) -> list[Contradiction]:
    """What is wrong with the rules together, each of them being valid alone; empty if nothing is."""
    return [problem for problem in (_never_saves(rules), _limit_below_what_is_kept(rules)) if problem is not None]


def _never_saves(rules: Mapping[str, Any]) -> Contradiction | None:
    found = {key: rules[key] for key in _WAYS_TO_SAVE}
    if any(found.values()):
        return None
    return Contradiction(found, "at least one of them on, such as save_steps: 1000, or nothing is ever saved")


def _limit_below_what_is_kept(rules: Mapping[str, Any]) -> Contradiction | None:
    last, best, limit = rules["keep_last"], rules["keep_best"], rules["save_total_limit"]
    if (last is None and best is None) or limit in (None, LIMIT_BY_DEFAULT):
        return None
    # The latest and the best are kept whatever the rules say, so each counts where no rule has it.
    need = (last or 1) + (best or 1)
    if limit >= need:
        return None
    parts = [
        "the latest" if last is None else f"keep_last {last}",
        "the best" if best is None else f"keep_best {best}",
    ]
    found = {key: rules[key] for key in ("save_total_limit", "keep_last", "keep_best") if rules[key] is not None}
    return Contradiction(
        found, f"a save_total_limit of at least {need} ({' + '.join(parts)}) instead of {limit}, or null"
    )
