"""A sweep as `sweep show` prints it: its trials and the best of them, read from what they left on storage."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from ray_tracking.checkpoint import CheckpointStore, CheckpointStrategy
from ray_tracking.errors import RayTrackingError
from ray_tracking.journal.reader import JournalReader
from ray_tracking.monitoring.overview import catch_up, last_sign_of_life, status_now
from ray_tracking.runs.store import RunStore
from ray_tracking.runs.summary import Summary
from ray_tracking.runs.sweep import SweepStore, TrialRecord, TrialStatus, best_of, ranking

_READERS = 16


@dataclass(frozen=True, slots=True)
class TrialView:
    """`value` is the best that the metric reached; `metrics` {key: {last, best}}; times are Unix seconds; `steps` the
    step it came to."""

    trial: int
    run_id: str
    status: str
    reason: str | None
    params: Mapping[str, Any]
    value: float | None
    metrics: Mapping[str, Mapping[str, float | None]]
    started: float | None
    ended: float | None
    steps: int = 0
    takeovers: tuple[Mapping[str, Any], ...] = ()
    """Of a population: each time that it went on from another trial's state, as in its record."""


@dataclass(frozen=True, slots=True)
class BestView:
    """The best trial. `checkpoint` is the folder of its best one, relative to the run, None if it has none."""

    trial: int
    run_id: str
    value: float
    params: Mapping[str, Any]
    checkpoint: str | None
    step: int | None


@dataclass(frozen=True, slots=True)
class SweepView:
    """`trials` in the order they were proposed, `ranking` their numbers, best first."""

    sweep_id: str
    name: str
    status: str
    metric: str
    mode: str
    path: str
    created: float
    ended: float | None
    trials: tuple[TrialView, ...]
    ranking: tuple[int, ...]
    best: BestView | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def sweep_view(runs: RunStore, sweep_id: str, now: float) -> SweepView:
    """Raises UsageError if there is no such sweep, RayTrackingError if a record is damaged."""
    record = runs.load(sweep_id)
    store = SweepStore(runs, sweep_id)
    metric, mode = store.aim()
    status = status_now(record, last_sign_of_life(record, Summary.load(store.directory)), now)
    records = store.load()
    with ThreadPoolExecutor(_READERS) as pool:
        trials = tuple(pool.map(lambda trial: _view(store, trial, metric, mode, status), records))
    valued = [_with_value(trial, view) for trial, view in zip(records, trials, strict=True)]
    return SweepView(
        sweep_id,
        record.name,
        status,
        metric,
        mode,
        store.directory.uri,
        record.created,
        record.ended,
        trials,
        tuple(trial.number for trial in ranking(valued, mode)),
        _best(store, valued, metric, mode),
    )


def _view(store: SweepStore, trial: TrialRecord, metric: str, mode: str, of_sweep: str) -> TrialView:
    run_id = store.run_id(trial.number)
    directory = store.runs.directory(run_id)
    summary = Summary.load(directory)
    status = trial.status
    if not status.is_over:
        try:
            reader = JournalReader(directory, strict=False)
            catch_up(summary, reader, reader.next_offset)
        except RayTrackingError:
            pass  # it has none yet, or not a whole one: what the summary has is shown
        if of_sweep != "running":
            status = TrialStatus.INTERRUPTED
    metrics = dict(sorted(summary.best(metric, mode).items()))
    value = trial.value if status.is_over else metrics.get(metric, {}).get("best")
    return TrialView(
        trial.number, run_id, status.value, trial.reason, trial.params, value, metrics, trial.started, trial.ended,
        summary.last_step, trial.takeovers,
    )  # fmt: skip


def _with_value(trial: TrialRecord, view: TrialView) -> TrialRecord:
    return TrialRecord(trial.number, trial.params, TrialStatus(view.status), value=view.value)


def _best(store: SweepStore, trials: list[TrialRecord], metric: str, mode: str) -> BestView | None:
    best = best_of(trials, mode)
    if best is None or best.value is None:
        return None
    run_id = store.run_id(best.number)
    checkpoints = CheckpointStore(store.runs.directory(run_id)).checkpoints()
    kept = CheckpointStrategy(monitor=metric, mode=mode).best(checkpoints)
    return BestView(
        best.number,
        run_id,
        best.value,
        best.params,
        None if kept is None else kept.folder,
        None if kept is None else kept.step,
    )
