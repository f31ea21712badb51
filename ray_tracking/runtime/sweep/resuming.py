"""Goes on with a sweep whose driver or cluster died, from its storage alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ray_tracking.config import get_config, with_overrides
from ray_tracking.log import get_logger
from ray_tracking.runs.resuming import changes, check_resumable, overrides_of
from ray_tracking.runs.store import RunStore
from ray_tracking.runs.sweep import SweepStore
from ray_tracking.runs.versions import installed_versions
from ray_tracking.runtime.context import Run
from ray_tracking.runtime.sweep.result import SweepResult
from ray_tracking.runtime.sweep.watching import Observer
from ray_tracking.runtime.target import load_target, ship_by_value
from ray_tracking.runtime.trainer import TrainingManager

log = get_logger()


def resume_sweep(
    runs: RunStore,
    sweep_id: str,
    *,
    train: Callable[[Run], Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    address: str | None = None,
    observer: Observer | None = None,
) -> SweepResult:
    """Trials that have ended stay; those under way go on from their checkpoints; the searcher knows what it knew.

    `train`: the function, where the record does not name it. `overrides` (dotted keys) go over the recorded config.
    Raises RefusedError for a completed sweep, UsageError for what is missing, and what a sweep raises.
    """
    record = runs.load(sweep_id)
    check_resumable(record, has_function=train is not None)
    record = replace(record, config=SweepStore(runs, sweep_id).config())
    given = dict(overrides or {})
    config = with_overrides(get_config(overrides=overrides_of(record, runs.storage.uri, given)), given)
    digest = record.code_digest
    if train is None:
        loaded = load_target(record.entrypoint or "")
        ship_by_value(loaded)
        train, digest = loaded.function, loaded.digest
    for change in changes(record, code_digest=digest, versions=installed_versions(), workers=config.scaling.workers):
        log.warning("resumed under other conditions", run=sweep_id, changed=change)
    manager = TrainingManager(config, run_id=sweep_id, address=address)
    return manager.sweep(train, entrypoint=record.entrypoint, code_digest=digest, observer=observer)
