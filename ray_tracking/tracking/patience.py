"""When a backend that fails is tried again, and when no more. No I/O, no clock of its own.

Each failure opens the circuit for longer: until the wait is over nothing at all is sent to that backend.
"""

from __future__ import annotations

from dataclasses import dataclass

LONGEST_WAIT_SECONDS = 60.0
LAST_PAUSE_SECONDS = 1.0
"""At most this long between the last tries, when the run ends."""
_LAST_TRIES = 3


def retry_wait(failures: int, retry_after: float | None) -> float:
    """Seconds until the next try after `failures` failures in a row: 1, 2, 4 ... 60, or what the backend asked for."""
    doubled = float(min(2 ** (failures - 1), LONGEST_WAIT_SECONDS)) if failures < 8 else LONGEST_WAIT_SECONDS
    return doubled if retry_after is None else max(retry_after, doubled)


@dataclass(slots=True)
class Patience:
    """With one backend. Times are monotonic seconds; `left` is how many there are until the run's end stops waiting.

    `tries`: give up after so many failures in a row; None: only once the run has ended.
    """

    tries: int | None = None
    failures: int = 0
    """In a row."""
    _at_end: int = 0
    _was_down: bool = False
    """When the run ended."""
    _not_before: float = 0.0

    def succeeded(self) -> None:
        self.failures, self._was_down = 0, False

    def failed(self, now: float, retry_after: float | None, *, at_end: bool) -> float:
        """Returns the seconds to wait while the run goes on."""
        self.failures += 1
        if at_end:
            self._at_end += 1
        else:
            self._was_down = True
        self._not_before = now + (retry_after or 0.0)
        return retry_wait(self.failures, retry_after)

    def last_pause(self, now: float, left: float, *, failed_at_end: bool) -> float:
        """Seconds to wait once the run has ended. What a backend asked for holds then too; all else is cut short."""
        asked = self._not_before - now
        if self.tries is not None:
            return max(asked, retry_wait(self.failures, None), 0.0)
        return max(asked, min(left, LAST_PAUSE_SECONDS) if failed_at_end else 0.0, 0.0)

    def is_exhausted(self, now: float, left: float | None) -> bool:
        """`left` is None while the run goes on.

        A backend that was down before the run ended is not waited for as long as one that was up; nor is one that has
        asked for a longer wait than there is time.
        """
        if self.tries is not None:
            return self.failures >= self.tries or self._not_before - now > LONGEST_WAIT_SECONDS
        if left is None:
            return False
        return (self._was_down and self._at_end >= _LAST_TRIES) or self._not_before - now > left
