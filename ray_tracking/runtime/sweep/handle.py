"""How a trial's workers reach their run in the hub, and what they say of a failure."""

from __future__ import annotations

from typing import Any

from ray_tracking.config import redact_text
from ray_tracking.errors import RayTrackingError


class _Remote:
    """`handle.method.remote(...)` with a run id put before the arguments."""

    def __init__(self, hub: Any, method: str, run_id: str) -> None:
        self._hub = hub
        self._method = method
        self._run_id = run_id

    def remote(self, *arguments: Any) -> Any:
        return getattr(self._hub, self._method).remote(self._run_id, *arguments)


class TrialHandle:
    """What stands for a tracker actor where there is a hub: one of its runs. Can be pickled."""

    def __init__(self, hub: Any, run_id: str) -> None:
        self.append = _Remote(hub, "append", run_id)
        self.call = _Remote(hub, "call", run_id)


def reason_in_words(error: BaseException) -> str:
    """One line, secrets removed."""
    text = redact_text(error.message if isinstance(error, RayTrackingError) else str(error)).strip()
    first = text.splitlines()[0] if text else ""
    return first if isinstance(error, RayTrackingError) else f"{type(error).__name__}: {first}".rstrip(": ")
