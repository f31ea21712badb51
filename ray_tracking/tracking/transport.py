"""How a sender reaches the tracker: one interface for the actor, the child process and tests."""

from __future__ import annotations

import marshal
from typing import Any, Protocol

from ray_tracking.records import Event


class TransportError(Exception):
    """The tracker could not be reached or could not store the batch; the sender keeps it and tries again."""


class Transport(Protocol):
    """Calls block until the tracker has answered. Thread-safe."""

    def append(self, rank: int, attempt: int, batch: bytes) -> int:
        """Journal a batch. Returns the sender's highest durable `seq`. Raises TransportError.

        Raises LeaseError if another process writes the run: that batch and all after it will never be taken.
        """
        ...

    def call(self, method: str, *arguments: Any, timeout: float | None = None) -> Any:
        """Call another method of the TrackerService. Raises TransportError, or what the method raises."""
        ...

    def close(self) -> None:
        """Let go of the tracker (it is not stopped by this)."""
        ...


def pack(events: list[tuple[Any, ...]]) -> bytes:
    """A batch on the wire. `marshal` is the fastest encoding of plain values, and time here is training's."""
    return marshal.dumps(events)


def unpack(batch: bytes) -> list[Event]:
    """The events of a packed batch. Only for batches of our own processes, over our own pipes."""
    return [Event(*fields) for fields in marshal.loads(batch)]  # noqa: S302
