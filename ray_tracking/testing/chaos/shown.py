"""What each backend of a run shows beside the run's journal, read by the backend's own client.

In: the run's directory and record. Out: a Difference per backend, or why one could not be read back.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from ray_tracking.journal.reader import JournalReader
from ray_tracking.storage import Storage
from ray_tracking.testing import readback
from ray_tracking.testing.backends import Point
from ray_tracking.testing.chaos.evidence import Difference, Ignored, compare_points
from ray_tracking.tracking.cursor import Cursor

_READERS: dict[str, Callable[[str, str], list[Point]]] = {
    "tensorboard": lambda location, _: readback.tensorboard_points(location),
    "mlflow": readback.mlflow_points,
    "wandb": lambda location, run_id: readback.wandb_points(location, run_id, whole=False),
}
"""(location, run id there) -> points."""
_SINGLE = frozenset({"tensorboard"})
"""Backends that keep 32-bit floats."""


def compare_backends(directory: Storage, ignored: Ignored) -> list[Difference]:
    """Every backend that the run had, against the scalars of its effective history."""
    table = JournalReader(directory).effective()
    logged: list[Point] = list(zip(*(table[name].to_pylist() for name in ("key", "step", "value")), strict=True))
    return [_compare(cursor, logged, ignored) for cursor in Cursor.load_all(directory)]


def _compare(cursor: Cursor, logged: list[Point], ignored: Ignored) -> Difference:
    reason = _unreadable(cursor)
    if reason is not None:
        return Difference(cursor.backend, 0, "points", skipped=reason)
    if cursor.location is None or cursor.run_id is None:
        why = f"it was never reached: {cursor.error or cursor.state.value}"
        return Difference(cursor.backend, len(logged), "points", lost=len(logged), examples=(why,))
    found = _READERS[cursor.backend](cursor.location, cursor.run_id)
    return compare_points(cursor.backend, logged, found, ignored, single=cursor.backend in _SINGLE)


def _unreadable(cursor: Cursor) -> str | None:
    if cursor.backend not in _READERS:
        return "no reader for it"
    if find_spec(cursor.backend) is None:
        return "its client is not installed"
    if cursor.backend == "wandb" and cursor.location and not readback.wandb_files(cursor.location, cursor.run_id or ""):
        return "it has no offline files"
    return None
