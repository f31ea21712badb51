"""When a run saves because its machine is being taken away. Pure, but for the clock that is given.

Once at the notice, so that there is something in any case; and once more shortly before the deadline, if there is one,
so that little of the time between is lost.
"""

from __future__ import annotations

_MARGIN_SECONDS = 5.0
"""Before the deadline, beside the time that the ranks need to meet and twice what the last save took."""
_MEETING_SECONDS = 2.0


class Notices:
    """Asked on rank 0 at each meeting of the ranks, about once a second."""

    def __init__(self) -> None:
        self._told_first = False
        self._told_for: float | None = None

    def is_due(self, preempted: bool, deadline: float | None, now: float, write_seconds: float) -> bool:
        """`deadline`, `now`: Unix seconds. `write_seconds`: what the last save took until it was on the storage."""
        if not preempted:
            return False
        if not self._told_first:
            self._told_first = True
            return True
        if deadline is None or self._told_for == deadline:
            return False
        if deadline - now > _MARGIN_SECONDS + _MEETING_SECONDS + 2 * write_seconds:
            return False
        self._told_for = deadline
        return deadline > now
