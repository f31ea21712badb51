"""Runs a sweep from its start, or from where its driver died, to a final record."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError

from ray_tracking.checkpoint import CheckpointStore, CheckpointStrategy
from ray_tracking.checkpoint.keys import Keyring
from ray_tracking.config import Config, redact
from ray_tracking.config.sweep import SweepConfig
from ray_tracking.errors import RefusedError, RunFailedError, UsageError
from ray_tracking.log import get_logger, is_debug
from ray_tracking.runs.record import Status
from ray_tracking.runs.store import RunStore, sweep_of
from ray_tracking.runs.summary import Summary
from ray_tracking.runs.sweep import SweepStore, TrialRecord, TrialStatus
from ray_tracking.runtime import cluster
from ray_tracking.runtime.capacity import per_worker, places
from ray_tracking.runtime.context import Run
from ray_tracking.runtime.ownership import Ownership, own
from ray_tracking.runtime.sweep.book import Book
from ray_tracking.runtime.sweep.launching import start_hub
from ray_tracking.runtime.sweep.recorded import RecordedSearcher
from ray_tracking.runtime.sweep.result import SweepResult, TrialResult
from ray_tracking.runtime.sweep.searchers import how_many, make_searcher
from ray_tracking.runtime.sweep.stopping import Reasons, StopRules, make_scheduler
from ray_tracking.runtime.sweep.trial import trial_function
from ray_tracking.runtime.sweep.watching import Observer, Watch
from ray_tracking.storage import Storage
from ray_tracking.tracking.spec import TrackerSpec

log = get_logger()

_SETTINGS = {
    # Ours are the journal and the backends; Tune's own files would be a second history beside them.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_FORCE_TRIAL_CLEANUP_S": "20",
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "10",  # what a stopped trial has for what it is writing
    "TUNE_GLOBAL_CHECKPOINT_S": "600",  # nothing is restored from it
    "TUNE_WARN_THRESHOLD_S": "5",
    "RAY_AIR_NEW_OUTPUT": "0",
}
_ENDING_SECONDS = 30.0


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
    if config.scaling.workers > 1:
        raise UsageError(
            f"scaling.workers: found {config.scaling.workers}; a trial of a sweep has one worker.",
            hint="Set scaling.workers: 1, and scaling.resources_per_worker for what each trial gets.",
        )
    storage = Storage.open(config.storage)
    storage.probe()
    store = SweepStore(RunStore(storage), spec.run_id)
    metric = search.metric or config.training.default.monitor
    mode = search.mode or config.training.default.mode
    Keyring.from_config(config.training.default.encryption)
    searcher = make_searcher(search, metric, mode, config.seed if search.seed is None else search.seed)
    with own(store.directory, config.failure.lease_secs) as owner:
        _check_new_or_unfinished(store, metric, mode)
        spec = replace(spec, monitor=metric, mode=mode, lease=owner.ticket)
        connected = cluster.connect(address, config.scaling)
        try:
            cluster.check(config.scaling, storage)
            at_once = _at_once(config, search)
            store.create(metric, mode, redact(config.to_dict()))  # before its run is: that alone would be a plain one
            hub, session = start_hub(config, spec, train)
            try:
                book = Book(store, mode, store.load())
                sweep = _Session(config, search, store, book, hub, metric, mode, at_once, observer)
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


class _Session:
    """One session of a sweep, from the searcher's first proposal to the last trial's end."""

    def __init__(
        self,
        config: Config,
        search: SweepConfig,
        store: SweepStore,
        book: Book,
        hub: Any,
        metric: str,
        mode: str,
        at_once: int,
        observer: Observer | None,
    ) -> None:
        self._config = config
        self._search = search
        self._store = store
        self._book = book
        self._hub = hub
        self._metric = metric
        self._mode = mode
        self._at_once = at_once
        self._total = how_many(search)
        self._reasons = Reasons()
        self._interrupted = False
        self._watch = Watch(
            hub,
            book,
            self._reasons,
            metric,
            total=self._total,
            at_once=at_once,
            keep_best=search.keep_best_trials,
            hang_secs=search.hang_secs,
            observer=observer,
            sweep_id=store.sweep_id,
        )

    def run(self, searcher: Any, session: int, owner: Ownership) -> tuple[Status, str, BaseException | None]:
        left = self._total - sum(trial.status.is_over for trial in self._book.trials)
        problem: BaseException | None = None
        if left > 0:
            try:
                with self._interrupt_in_order(), owner.aborting(self._abort):
                    self._tune(searcher, left, session)
            except (RayError, tune.TuneError) as error:
                problem = RunFailedError(f"Ray Tune ended the sweep: {str(error).strip().splitlines()[-1]}")
            except KeyboardInterrupt:
                self._interrupted = True
        owner.check()  # if it raises, the records are another one's to write by now
        self._end_the_rest(lost=problem is not None)
        if problem is not None:
            return Status.FAILED, str(problem), problem
        if self._interrupted:
            return Status.ABORTED, "interrupted", KeyboardInterrupt()
        if self._book.best is None:
            return Status.FAILED, "no trial got to a value", self._all_failed()
        return Status.COMPLETED, self._reasons.sweep or "completed", None

    def _abort(self) -> None:
        self._reasons.sweep = "another process goes on with the sweep"

    def _tune(self, searcher: Any, left: int, session: int) -> None:
        directory = self._store.directory
        os.environ.update({name: os.environ.get(name, value) for name, value in _SETTINGS.items()})
        if not is_debug():
            logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        analysis = tune.run(
            trial_function(self._hub),
            name=f"tune-{session:03d}",
            storage_path=directory.root,
            storage_filesystem=directory.portable_filesystem(),
            num_samples=left,
            resources_per_trial=tune.PlacementGroupFactory([per_worker(self._config.scaling) or {"CPU": 0.001}]),
            search_alg=RecordedSearcher(
                searcher, self._book, self._metric, self._mode, lambda *names: ray.get(self._hub.expect.remote(*names))
            ),
            scheduler=make_scheduler(self._search.scheduler, self._metric, self._mode, self._reasons),
            stop=StopRules(self._search.stop, self._metric, self._mode, self._reasons, lambda: self._book.since_gain),
            callbacks=[self._watch],
            max_failures=self._config.failure.max_failures,
            max_concurrent_trials=self._at_once,
            reuse_actors=True,
            raise_on_failed_trial=False,
            verbose=0,
        )
        self._watch.note_missed(analysis.trials)

    def _end_the_rest(self, lost: bool) -> None:
        """Trials that Tune no longer runs and has not ended."""
        ending = self._watch
        for trial in self._book.trials:
            if trial.status is TrialStatus.RUNNING and not ending.is_ending(trial.number):
                if self._interrupted or lost:
                    ending.end(trial.number, TrialStatus.INTERRUPTED, "interrupted")
                else:
                    ending.end(trial.number, TrialStatus.STOPPED, self._reasons.sweep or "ended with the sweep")
        delivery = self._config.experiment_tracking.delivery
        ending.finish(_ENDING_SECONDS + delivery.final_secs)

    def _all_failed(self) -> RunFailedError:
        reasons = [f"trial {trial.number}: {trial.reason}" for trial in self._book.trials]
        return RunFailedError(
            f"The sweep {self._store.sweep_id} has no trial with a value:\n" + "\n".join(reasons[:10]),
            hint=f"See all of it: `ray-tracking sweep show {self._store.sweep_id}`.",
        )

    @contextmanager
    def _interrupt_in_order(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM have Tune end its trials; a second one interrupts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def interrupt(_number: int, _frame: FrameType | None) -> None:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
            self._reasons.sweep = "interrupted"

        before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


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


def _at_once(config: Config, search: SweepConfig) -> int:
    """How many trials run at a time: as configured, or as many as the cluster holds."""
    each = per_worker(config.scaling)
    fitting = sum(places(each, node) for node in cluster.living_nodes())
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
