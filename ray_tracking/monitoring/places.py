"""Where checkpoints lie, and what is known about whoever writes them: a run's directory or a plain script's.

In: a run of a storage, or a directory. Out: `Place`, with the rules that say what is best and what is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ray_tracking.checkpoint.manifest import CheckpointInfo
from ray_tracking.checkpoint.store import CheckpointStore
from ray_tracking.checkpoint.strategy import CheckpointStrategy
from ray_tracking.errors import RayTrackingError, UsageError
from ray_tracking.monitoring.overview import last_sign_of_life, status_now
from ray_tracking.runs.lease import holder
from ray_tracking.runs.record import RunRecord, Status
from ray_tracking.runs.store import RunStore
from ray_tracking.runs.summary import Summary
from ray_tracking.storage import Storage, without_credentials

SCRIPTS = "checkpoints"
"""The folder of the storage where plain scripts keep checkpoints unless they say otherwise."""
_RECORD = "run.json"


class Activity(StrEnum):
    """Whether a save may be under way. `unknown`: nobody says, as in a plain script's directory."""

    ENDED = "ended"
    RUNNING = "running"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Place:
    """One directory of checkpoints. `section` is its `training.default`, empty if not known."""

    storage: Storage
    run_id: str | None = None
    activity: Activity = Activity.UNKNOWN
    newest_attempt: int = 0
    monitor: str | None = None
    mode: str = "min"
    section: Mapping[str, Any] = field(default_factory=dict)

    @property
    def store(self) -> CheckpointStore:
        return CheckpointStore(self.storage)

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"run {self.run_id}" if self.run_id else self.shown

    @property
    def shown(self) -> str:
        """Its path or URI, fit to be printed."""
        return without_credentials(self.storage.uri)

    def best(self, infos: Sequence[CheckpointInfo]) -> CheckpointInfo | None:
        """By the monitor; where no checkpoint has it, the newest that improved on all before it when it was saved."""
        if self.monitor is not None:
            best = CheckpointStrategy(monitor=self.monitor, mode=self.mode).best(infos)
            if best is not None:
                return best
        return next((info for info in reversed(infos) if info.improved), None)

    def shown_metric(self, infos: Sequence[CheckpointInfo]) -> str | None:
        """The metric a list shows: the monitor, or the only one there is."""
        known = {key for info in infos for key in info.metrics}
        if self.monitor in known:
            return self.monitor
        return known.pop() if len(known) == 1 else None


def run_place(runs: RunStore, run_id: str, now: float) -> Place:
    """Raises UsageError if there is no such run, RayTrackingError if its run.json is damaged."""
    return _of_record(runs.load(run_id), runs.directory(run_id), now)


def directory_place(
    uri: str, section: Mapping[str, Any], now: float, *, monitor: str | None = None, mode: str = "min"
) -> Place:
    """A plain script's directory, or a run's given by its path. Raises UsageError if there is none."""
    storage = Storage.open(uri)
    if not storage.exists():
        raise UsageError(
            f"There is no directory {without_credentials(storage.uri)}.",
            hint="Give the one that training.default.checkpoint_dir names.",
        )
    try:
        data = storage.read_bytes(_RECORD)
    except FileNotFoundError:
        return Place(storage, monitor=monitor, mode=mode, section=section)
    return _of_record(RunRecord.from_json(data, storage.path(_RECORD)), storage, now)


def run_places(runs: RunStore, run_ids: Iterable[str], now: float) -> tuple[list[Place], list[str]]:
    """The places of these runs; also what could not be read, and why."""
    places, problems = [], []
    for run_id in run_ids:
        try:
            places.append(run_place(runs, run_id, now))
        except RayTrackingError as error:
            problems.append(f"{run_id}: {error}")
    return places, problems


def all_places(runs: RunStore, now: float) -> tuple[list[Place], list[str]]:
    """Every run of a storage, those that are trials too, and the directory of plain scripts beside them; also what
    could not be read, and why."""
    places, problems = run_places(runs, (each for run_id in runs.ids() for each in (run_id, *runs.trials(run_id))), now)
    if runs.storage.exists(SCRIPTS):
        places.append(Place(runs.storage.child(SCRIPTS)))
    return places, problems


def _of_record(record: RunRecord, directory: Storage, now: float) -> Place:
    status = status_now(record, last_sign_of_life(record, Summary.load(directory)), now)
    if status != Status.RUNNING and holder(directory) is not None:
        status = Status.RUNNING.value  # a driver that has just begun to resume it, or one that waits for its cluster
    training = record.config.get("training") or {}
    return Place(
        directory,
        record.run_id,
        # one that fell silent may only be cut off from the storage for a while
        Activity.RUNNING if status == Status.RUNNING
        else Activity.UNKNOWN if status == Status.INTERRUPTED
        else Activity.ENDED,
        record.attempts[-1].number if record.attempts else 0,
        record.monitor,
        record.mode,
        training.get("default") or {},
    )  # fmt: skip
