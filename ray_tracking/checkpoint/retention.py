"""One pass of keeping house: what the strategy no longer keeps, and what no save will ever finish."""

from __future__ import annotations

from ray_tracking.checkpoint.manifest import CheckpointInfo
from ray_tracking.checkpoint.store import CheckpointStore, Found, newest_per_step
from ray_tracking.checkpoint.strategy import CheckpointStrategy
from ray_tracking.log import get_logger

_log = get_logger()


def apply_retention(store: CheckpointStore, strategy: CheckpointStrategy) -> list[str]:
    """Delete what `strategy` does not keep, older doubles of a step, and leftovers; returns the deleted
    folders.

    Only one process (rank 0) may call it, after a save. It may be killed at any moment and simply runs again.
    """
    found = store.scan()
    doomed = due(found, strategy) + leftovers(found)
    for folder in doomed:
        store.delete(folder)
    if doomed:
        _log.debug("checkpoints deleted", folders=doomed)
    return doomed


def gc(store: CheckpointStore, *, dry_run: bool = False) -> list[str]:
    """Delete incomplete folders that are older than the newest complete checkpoint; returns them."""
    doomed = leftovers(store.scan())
    for folder in () if dry_run else doomed:
        store.delete(folder)
    return doomed


def due(found: list[Found], strategy: CheckpointStrategy) -> list[str]:
    """Folders of complete checkpoints that go. Pure."""
    complete = [item.info for item in found if item.info is not None]
    visible = newest_per_step(complete)
    shown = {info.folder for info in visible}
    doubles = [info for info in complete if info.folder not in shown and not info.pinned]
    gone: list[CheckpointInfo] = doubles + strategy.to_delete(visible)
    return [info.folder for info in gone]


def leftovers(found: list[Found]) -> list[str]:
    """Incomplete folders older than the newest complete checkpoint: a save still under way is never among
    them. Pure.
    """
    newest = max(((item.attempt, item.step) for item in found if item.info is not None), default=(-1, -1))
    return [item.folder for item in found if item.info is None and (item.attempt, item.step) < newest]
