"""What retention would delete of a place's checkpoints and why it keeps the others; and doing it.

In: a `Place`, one scan of its store, rules. Out: a line for each complete checkpoint. Only `prune` deletes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray_tracking.checkpoint.manifest import PIN_FILE, CheckpointInfo
from ray_tracking.checkpoint.retention import explain, why_gone
from ray_tracking.checkpoint.store import Found, newest_per_step
from ray_tracking.checkpoint.strategy import CheckpointStrategy
from ray_tracking.errors import RayTrackingError, UsageError
from ray_tracking.monitoring.checkpoints import BEST, choose, complete
from ray_tracking.monitoring.places import Place


@dataclass(frozen=True, slots=True)
class PruneLine:
    """What becomes of one complete checkpoint. `why`: the rules that want it, or why it goes."""

    info: CheckpointInfo
    delete: bool
    why: str

    def to_json(self) -> dict[str, Any]:
        shown = {key: getattr(self.info, key) for key in ("step", "attempt", "folder", "pinned")}
        return {**shown, "bytes": self.info.size, "delete": self.delete, "why": self.why}


def rules(
    place: Place, *, keep_last: int | None = None, keep_best: int | None = None, keep_every: int | None = None
) -> CheckpointStrategy:
    """What to keep: these rules if one is given, else those of the run's config. UsageError if none are known."""
    if keep_last is None and keep_best is None and keep_every is None:
        if not place.section:
            raise UsageError(
                f"What is to be kept in {place.title} is not known.",
                hint="Say it with --keep-last, --keep-best, --keep-every, or give its config with -c.",
            )
        given = {**place.section, "mode": place.mode, **({"monitor": place.monitor} if place.monitor else {})}
        return CheckpointStrategy.from_config(given)
    return CheckpointStrategy(
        monitor=place.monitor or CheckpointStrategy().monitor,
        mode=place.mode,
        keep_last=keep_last,
        keep_best=keep_best,
        keep_every_steps=keep_every,
        # beside keep_every alone only what is always kept
        save_total_limit=1 if keep_last is None and keep_best is None else None,
    )


def prune_plan(place: Place, found: Sequence[Found], strategy: CheckpointStrategy) -> list[PruneLine]:
    """A verdict on every complete checkpoint, oldest first. Raises UsageError where the best is not known: it might
    go."""
    infos = [item.info for item in found if item.info is not None]
    best = place.best(complete(found))
    if best is None and place.monitor is None and any(info.metrics for info in infos):
        choose(place, found, BEST)
    newest = {info.step: info for info in complete(found)}
    planned = []
    for info, keeps in explain(infos, strategy):
        if best is not None and info.folder == best.folder and "best" not in keeps:
            keeps = (*keeps, "best")
        # all that matters of the others: whether one of them has taken its place
        why = ", ".join(keeps) if keeps else why_gone(info, (info, newest[info.step]), strategy)
        planned.append(PruneLine(info, not keeps, why))
    return planned


def prune(place: Place, plan: Sequence[PruneLine]) -> list[tuple[PruneLine, str]]:
    """Delete what the plan says; what was not deleted after all, with the reason.

    Older doubles of a step go first, so that none of them stands for its step again if this is cut short.
    """
    store = place.store
    shown = {info.folder for info in newest_per_step(line.info for line in plan)}
    failed = []
    for line in sorted(plan, key=lambda each: (each.info.folder in shown, each.info.order)):
        if not line.delete:
            continue
        try:
            if place.storage.exists(f"{line.info.folder}/{PIN_FILE}"):
                failed.append((line, "it has been pinned meanwhile"))
            else:
                store.delete(line.info.folder)
        except RayTrackingError as error:
            failed.append((line, error.message))
    return failed
