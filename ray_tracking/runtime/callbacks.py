"""What Ray Train's controller tells us while a run goes on."""

from __future__ import annotations

from typing import Any

from ray.train import UserCallback

from ray_tracking.runtime.failures import reason_of_ranks


class NoteFailures(UserCallback):
    """Tells the tracker why an attempt ended. Runs on the controller's event loop: it must neither block nor raise."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        # Not awaited: an answer is not needed, and waiting would hold up the restart.
        self._actor.call.remote("end_attempt", reason_of_ranks(worker_exceptions).summary)
