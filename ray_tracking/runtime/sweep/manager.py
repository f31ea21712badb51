"""Runs a sweep from its start, or from where its driver died, to a final record."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError

from ray_tracking.checkpoint import CheckpointStore, CheckpointStrategy
from ray_tracking.checkpoint.keys import Keyring
from ray_tracking.config import Config, redact
from ray_tracking.config.sweep import POPULATIONS, SweepConfig
from ray_tracking.errors import RefusedError, UsageError
from ray_tracking.log import get_logger
from ray_tracking.runs import stopping
from ray_tracking.runs.record import Status
from ray_tracking.runs.store import RunStore, sweep_of
from ray_tracking.runs.summary import Summary
from ray_tracking.runs.sweep import SweepStore, TrialRecord
from ray_tracking.runtime import cluster
from ray_tracking.runtime.capacity import per_worker, places
from ray_tracking.runtime.context import Run
from ray_tracking.runtime.ownership import own
from ray_tracking.runtime.sweep.book import Book
from ray_tracking.runtime.sweep.launching import start_hub
from ray_tracking.runtime.sweep.result import SweepResult, TrialResult
from ray_tracking.runtime.sweep.searchers import how_many, make_searcher
from ray_tracking.runtime.sweep.session import Session
from ray_tracking.runtime.sweep.watching import Observer
from ray_tracking.storage import Storage
from ray_tracking.tracking.spec import TrackerSpec

log = get_logger()


def run_sweep(
    config: Config,
    spec: TrackerSpec,
    train: Callable[[Run], Any],
    *,
    address: str | None,
    observer: Observer | None,
) -> SweepResult:
    """Search to the end. `spec`: the tracker's, of a plain run of this config. Blocks; call it from the main thread.

    Raises UsageError before anything starts; RefusedError for a sweep that is completed; RunFailedError if no trial got
    to a value; KeyboardInterrupt after Ctrl-C or SIGTERM, when the trials have been ended in order.
    """
    search = config.sweep
    if search is None:
        raise UsageError(
            "The configuration has no sweep section.",
            hint="Say what to search: sweep: {space: {lr: {loguniform: [1e-5, 1e-1]}}}",
        )
    began = time.time()
    storage = Storage.open(config.storage)
    storage.probe()
    store = SweepStore(RunStore(storage), spec.run_id)
    metric = search.metric or config.training.default.monitor
    mode = search.mode or config.training.default.mode
    Keyring.from_config(config.training.default.encryption)
    seed = config.seed if search.seed is None else search.seed
    searcher = make_searcher(search, metric, mode, seed)
    with own(store.directory, config.failure.lease_secs) as owner:
        _check_new_or_unfinished(store, metric, mode)
        stopping.clear(store.directory, began)
        spec = replace(spec, monitor=metric, mode=mode, lease=owner.ticket)
        connected = cluster.connect(address, config.scaling)
        try:
            cluster.check(config.scaling, storage)
            at_once = _at_once(config, search)
            _check_population(search, at_once)
            store.create(metric, mode, redact(config.to_dict()))  # before its run is: that alone would be a plain one
            hub, session = start_hub(config, spec, train, at_once)
            try:
                book = Book(store, mode, store.load())
                sweep = Session(config, search, store, book, hub, metric, mode, seed, at_once, observer)
                status, reason, error = sweep.run(searcher, session, owner)
                owner.check()
                _answer(
                    hub.close.remote(status.value, redact(reason)), "the sweep's own run could not be ended in order"
                )
            finally:
                ray.kill(hub)
        finally:
            if connected:
                ray.shutdown()
    if error is not None:
        raise error
    return result_of(store, config, status)


def _check_new_or_unfinished(store: SweepStore, metric: str, mode: str) -> None:
    if sweep_of(store.sweep_id) is not None:
        raise UsageError(f"{store.sweep_id!r} is a trial's run id.", hint="Choose another --run-id for the sweep.")
    if not store.runs.exists(store.sweep_id):
        return
    if store.runs.load(store.sweep_id).status is Status.COMPLETED:
        raise RefusedError(
            f"The sweep {store.sweep_id!r} is completed.",
            hint="Choose another --run-id, or leave it out for a new one.",
        )
    if not store.exists():
        raise RefusedError(f"{store.sweep_id!r} is a run, no sweep.", hint="Choose another --run-id for the sweep.")
    if store.aim() != (metric, mode):
        raise RefusedError(
            f"The sweep {store.sweep_id!r} searches for another metric: {' '.join(reversed(store.aim()))}.",
            hint="Resume it as it was begun, or start a new one.",
        )


def _check_population(search: SweepConfig, at_once: int) -> None:
    if search.scheduler.name in POPULATIONS and at_once < how_many(search):
        raise UsageError(
            f"{search.scheduler.name} trains all of its {how_many(search)} trials side by side, "
            f"and {at_once} can run at a time.",
            hint="Set sweep.num_samples to that, give each worker less (scaling.resources_per_worker: {CPU: 0.5}), "
            "leave sweep.max_concurrent out, or use a larger cluster.",
        )


def _at_once(config: Config, search: SweepConfig) -> int:
    """How many trials run at a time: as configured, or as many as the cluster holds."""
    each = per_worker(config.scaling)
    fitting = sum(places(each, node) for node in cluster.living_nodes()) // config.scaling.workers
    wanted = search.max_concurrent or fitting
    if wanted > fitting:
        log.warning("the cluster holds fewer trials at a time than asked for", asked=wanted, held=fitting)
    return max(1, min(wanted, fitting, how_many(search)))


def _answer(call: Any, otherwise: str) -> None:
    try:
        ray.get(call)
    except RayError as error:
        log.error(otherwise, error=str(error).strip().splitlines()[-1])


def result_of(store: SweepStore, config: Config, status: Status) -> SweepResult:
    """The sweep as its records have it."""
    metric, mode = store.aim()
    rules = config.training.default.model_copy(update={"monitor": metric, "mode": mode})
    strategy = CheckpointStrategy.from_config(rules)
    records = store.load()
    trials = [_trial_result(store, record, strategy, metric, mode) for record in records]
    book = Book(store, mode, records)
    best = next((trial for trial in trials if book.best is not None and trial.trial == book.best.number), None)
    return SweepResult(store.sweep_id, status.value, store.directory.uri, metric, mode, trials, best)


def _trial_result(
    store: SweepStore, record: TrialRecord, strategy: CheckpointStrategy, metric: str, mode: str
) -> TrialResult:
    directory = store.runs.directory(store.run_id(record.number))
    metrics: Mapping[str, Mapping[str, float | None]] = Summary.load(directory).best(metric, mode)
    return TrialResult(
        record.number,
        store.run_id(record.number),
        record.status.value,
        record.reason,
        record.params,
        record.value,
        metrics,
        strategy.best(CheckpointStore(directory).checkpoints()),
    )
