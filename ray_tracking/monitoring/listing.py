"""All runs of a storage, newest first: what `runs ls` prints.

In: a RunStore. Out: a `RunLine` per run; a run whose run.json is damaged is listed with the reason,
never left out.
Two small files are read per run, several runs at a time,
for storages where each read takes a tenth of a second.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from ray_tracking.errors import RayTrackingError
from ray_tracking.monitoring.overview import last_sign_of_life, status_now
from ray_tracking.runs.record import RunRecord
from ray_tracking.runs.store import RunStore
from ray_tracking.runs.summary import Summary

_READERS = 16


@dataclass(frozen=True, slots=True)
class RunLine:
    """A run in a list. `best` is the monitor's best value; `created` and `alive` are Unix times."""

    run_id: str
    name: str
    status: str
    last_step: int
    monitor: str | None
    best: float | None
    created: float
    alive: float
    attempts: int
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run_lines(store: RunStore, now: float) -> list[RunLine]:
    """Newest first by the time of creation; damaged ones last."""
    with ThreadPoolExecutor(_READERS) as pool:
        lines = list(pool.map(lambda run_id: _line(store, run_id, now), store.ids()))
    return sorted(lines, key=lambda line: (line.created, line.run_id), reverse=True)


def newest(store: RunStore) -> str | None:
    """The id of the run created last, None without runs."""
    with ThreadPoolExecutor(_READERS) as pool:
        created = list(pool.map(lambda run_id: (_created(store, run_id), run_id), store.ids()))
    return max(created)[1] if created else None


def _created(store: RunStore, run_id: str) -> float:
    try:
        return store.load(run_id).created
    except RayTrackingError:  # damaged: `runs ls` shows it, `latest` is some other
        return 0.0


def _line(store: RunStore, run_id: str, now: float) -> RunLine:
    try:
        record = store.load(run_id)
        return line_of(record, Summary.load(store.directory(run_id)), now)
    except RayTrackingError as error:
        return RunLine(run_id, "", "damaged", 0, None, None, 0.0, 0.0, 0, str(error))


def line_of(record: RunRecord, summary: Summary, now: float) -> RunLine:
    alive = last_sign_of_life(record, summary)
    values = summary.best(record.monitor, record.mode).get(record.monitor or "", {})
    return RunLine(
        run_id=record.run_id,
        name=record.name,
        status=status_now(record, alive, now),
        last_step=summary.last_step,
        monitor=record.monitor,
        best=values.get("best"),
        created=record.created,
        alive=alive,
        attempts=len(record.attempts),
    )
