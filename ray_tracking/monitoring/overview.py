"""One run at a glance: what `runs show` and `status` print.

In: the run's directory (run.json, summary, cursors, journal names, checkpoint manifests). Out: `Overview`.
No record is read unless the summary is behind the journal, as after a crash: then only the rows it lacks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ray_tracking.checkpoint.store import CheckpointStore, Found, newest_per_step
from ray_tracking.checkpoint.strategy import CheckpointStrategy
from ray_tracking.journal.reader import JournalReader
from ray_tracking.runs.record import Attempt, RunRecord, Status
from ray_tracking.runs.store import RunStore
from ray_tracking.runs.summary import Summary
from ray_tracking.tracking.cursor import BackendState, Cursor

SILENT_SECONDS = 60.0
"""A run that says `running` and has shown no sign of life for this long is `interrupted`."""
_TAIL_ROWS = 50_000
_SHOWN = ("run_id", "name", "status", "attempts", "last_step", "metrics", "backends", "checkpoints")


@dataclass(frozen=True, slots=True)
class BackendView:
    """How a backend stands. `delivered`, `pending` and `dropped` count journal rows."""

    state: str
    delivered: int
    pending: int
    dropped: int
    run_id: str | None
    location: str | None
    error: str | None
    unsupported: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CheckpointView:
    """One checkpoint folder; `why` says what an incomplete one lacks."""

    step: int
    complete: bool
    best: bool
    pinned: bool
    bytes: int
    why: str | None = None


@dataclass(frozen=True, slots=True)
class Overview:
    """A run at a glance. `alive` is the Unix time of its last sign of life, `metrics` is `{key:
    {last, best}}`."""

    run_id: str
    name: str
    status: str
    attempts: tuple[Attempt, ...]
    last_step: int
    metrics: Mapping[str, Mapping[str, float | None]]
    backends: Mapping[str, BackendView]
    checkpoints: tuple[CheckpointView, ...]
    created: float
    ended: float | None
    alive: float
    monitor: str | None
    entrypoint: str | None
    path: str
    records: int
    problems: tuple[str, ...] = ()
    """What could not be read, so that one damaged part does not hide the rest."""

    def to_json(self) -> dict[str, Any]:
        """What `runs show --json` prints; `problems` only if there are any."""
        document = {key: value for key, value in asdict(self).items() if key in _SHOWN}
        for attempt in document["attempts"]:
            del attempt["world_size"]
        return {**document, "problems": self.problems} if self.problems else document


def overview(store: RunStore, run_id: str, now: float) -> Overview:
    """Everything about a run. Raises UsageError if there is no such run,
    RayTrackingError if run.json is damaged."""
    record = store.load(run_id)
    directory = store.directory(run_id)
    reader = JournalReader(directory, strict=False)
    next_offset = reader.next_offset
    summary = Summary.load(directory)
    catch_up(summary, reader, next_offset)
    problems = [f"The journal is damaged, these records are left out: {skipped}" for skipped in reader.skipped]
    checkpoints = CheckpointStore(directory).scan()
    alive = last_sign_of_life(record, summary)
    return Overview(
        run_id=record.run_id,
        name=record.name,
        status=status_now(record, alive, now),
        attempts=record.attempts,
        last_step=summary.last_step,
        metrics=dict(sorted(summary.best(record.monitor, record.mode).items())),
        backends=backends(record, Cursor.load_all(directory), next_offset),
        checkpoints=checkpoint_views(checkpoints, record.monitor, record.mode),
        created=record.created,
        ended=record.ended,
        alive=alive,
        monitor=record.monitor,
        entrypoint=record.entrypoint,
        path=directory.uri,
        records=next_offset,
        problems=tuple(problems),
    )


def catch_up(summary: Summary, reader: JournalReader, next_offset: int) -> None:
    """Add the journal rows that the saved summary does not know yet."""
    while summary.offset < next_offset:
        rows = reader.read(summary.offset, _TAIL_ROWS)
        if not rows:
            return
        summary.add(rows)


def last_sign_of_life(record: RunRecord, summary: Summary) -> float:
    """Unix time; a run whose tracker has not written yet lives from the start of its newest attempt."""
    started = record.attempts[-1].started if record.attempts else record.created
    return max(summary.updated, record.ended or 0.0, started)


def status_now(record: RunRecord, alive: float, now: float) -> str:
    """The recorded status, `interrupted` where a running one has fallen silent."""
    if record.status is Status.RUNNING and now - alive > SILENT_SECONDS:
        return Status.INTERRUPTED.value
    return record.status.value


def backends(record: RunRecord, cursors: Iterable[Cursor], next_offset: int) -> dict[str, BackendView]:
    """By name: every backend that has a cursor, and every one the config switches on that has none yet."""
    views = {
        cursor.backend: BackendView(
            state=cursor.state.value,
            delivered=cursor.delivered,
            pending=max(0, next_offset - cursor.offset),
            dropped=cursor.dropped,
            run_id=cursor.run_id,
            location=cursor.location,
            error=cursor.error,
            unsupported=tuple(cursor.unsupported),
        )
        for cursor in cursors
    }
    waiting = BackendState.PENDING if record.status.is_final else BackendState.STARTING
    for name in enabled_backends(record.config):
        if name not in views:
            views[name] = BackendView(waiting.value, 0, next_offset, 0, None, None, "nothing delivered yet", ())
    return dict(sorted(views.items()))


def enabled_backends(config: Mapping[str, Any]) -> list[str]:
    """The names that `experiment_tracking` switches on."""
    section = config.get("experiment_tracking") or {}
    if not section.get("enabled", True):
        return []
    return [name for name, options in section.items() if isinstance(options, Mapping) and options.get("enabled")]


def checkpoint_views(found: Sequence[Found], monitor: str | None, mode: str) -> tuple[CheckpointView, ...]:
    """Every checkpoint folder in the order it was made:
    of several complete ones at a step the newest, the best marked."""
    complete = newest_per_step(item.info for item in found if item.info is not None)
    best = CheckpointStrategy(monitor=monitor, mode=mode).best(complete) if monitor else None
    views = {
        info.folder: CheckpointView(
            info.step, True, best is not None and info.folder == best.folder, info.pinned, info.size
        )
        for info in complete
    }
    for item in found:
        if item.info is None:
            views[item.folder] = CheckpointView(item.step, False, False, False, 0, item.reason)
    places = {item.folder: (item.attempt, item.step) for item in found}
    return tuple(views[folder] for folder in sorted(views, key=lambda folder: (places[folder], folder)))
