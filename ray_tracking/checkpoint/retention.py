"""One pass of keeping house: what the strategy no longer keeps, and what no save will ever finish."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import NamedTuple

from ray_tracking.checkpoint.manifest import CheckpointInfo
from ray_tracking.checkpoint.store import CheckpointStore, Found, newest_per_step
from ray_tracking.checkpoint.strategy import CheckpointStrategy
from ray_tracking.log import get_logger

_log = get_logger()


class Verdict(NamedTuple):
    """What a retention pass makes of one complete checkpoint: `keeps` are the rules that want it, empty if it goes."""

    info: CheckpointInfo
    keeps: tuple[str, ...]


def apply_retention(
    store: CheckpointStore, strategy: CheckpointStrategy, *, under_way: Collection[str] = ()
) -> list[str]:
    """Delete what `strategy` does not keep, older doubles of a step, and leftovers; returns the deleted
    folders.

    `under_way`: folders that are being written, where the caller knows them. Only one process (rank 0) may call it,
    after a save. It may be killed at any moment and simply runs again.
    """
    found = store.scan()
    doomed = due(found, strategy) + leftovers(found, under_way=under_way)
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


def explain(infos: Iterable[CheckpointInfo], strategy: CheckpointStrategy) -> list[Verdict]:
    """What a retention pass would make of these complete checkpoints, doubles of a step among them; oldest first.
    Pure.
    """
    everything = newest_per_step(infos, keep_all=True)
    shown = newest_per_step(everything)
    listed = {info.folder for info in shown}
    doubles = [info for info in everything if info.folder not in listed]
    # A pin holds for its step: were the newer save deleted, the pinned one would come to light again in its place
    # and could be another best than the one that retention has kept.
    pinned = {info.step for info in doubles if info.pinned}
    reasons = strategy.keeps(replace(info, pinned=info.pinned or info.step in pinned) for info in shown)
    reasons |= {info.folder: ("pinned",) if info.pinned else () for info in doubles}
    return [Verdict(info, reasons[info.folder]) for info in everything]


def why_gone(info: CheckpointInfo, infos: Iterable[CheckpointInfo], strategy: CheckpointStrategy) -> str:
    """In words, why a checkpoint that `explain` keeps for no rule goes. Pure."""
    if info.folder not in {each.folder for each in newest_per_step(infos)}:
        return "saved again later"
    if strategy.save_best_only and not info.improved:
        return "no improvement, and no longer the newest"
    rules = [
        f"the {kind} {count}"
        for kind, count in (("last", strategy.keep_last), ("best", strategy.keep_best))
        if count is not None
    ]
    return f"beyond {' and '.join(rules)}" if rules else f"beyond the limit of {strategy.save_total_limit}"


def due(found: list[Found], strategy: CheckpointStrategy) -> list[str]:
    """Folders of complete checkpoints that go, in the order in which to delete them. Pure.

    Oldest first: of two saves of a step the older one goes before the newer one, so that it never stands for the step
    again if the pass is cut short.
    """
    complete = [item.info for item in found if item.info is not None]
    return [info.folder for info, keeps in explain(complete, strategy) if not keeps]


def leftovers(found: list[Found], *, under_way: Collection[str] = ()) -> list[str]:
    """Incomplete folders older than the newest complete checkpoint, but for those `under_way`. Pure.

    Where steps only grow within an attempt, a save still under way is never among them. What another version of this
    package wrote is left alone.
    """
    newest = max(((item.attempt, item.step) for item in found if item.info is not None), default=(-1, -1))
    return [
        item.folder
        for item in found
        if item.info is None
        and not item.other_version
        and (item.attempt, item.step) < newest
        and item.folder not in under_way
    ]
