"""One session of a sweep: Ray Tune runs its trials, from the first proposal to the last trial's end.

In: what the driver has made ready. Out: how the session ended; the book and the hub have the rest.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ray import tune
from ray.exceptions import RayError

from ray_tracking.config import Config, ScalingConfig
from ray_tracking.config.sweep import SweepConfig
from ray_tracking.errors import RunFailedError
from ray_tracking.log import get_logger, is_debug
from ray_tracking.runs.record import Status
from ray_tracking.runs.sweep import SweepStore, TrialStatus
from ray_tracking.runtime.capacity import per_worker
from ray_tracking.runtime.ownership import Ownership
from ray_tracking.runtime.sweep.asked import STOPPED_BY_REQUEST, Asked
from ray_tracking.runtime.sweep.book import Book, Exploit
from ray_tracking.runtime.sweep.hyperband import HyperBand
from ray_tracking.runtime.sweep.recorded import RecordedSearcher, trial_config
from ray_tracking.runtime.sweep.searchers import how_many
from ray_tracking.runtime.sweep.stopping import Reasons, StopRules, make_scheduler
from ray_tracking.runtime.sweep.trial import trial_function
from ray_tracking.runtime.sweep.watching import Observer, Watch

log = get_logger()

_SETTINGS = {
    # Ours are the journal and the backends; Tune's own files would be a second history beside them.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_FORCE_TRIAL_CLEANUP_S": "60",
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "40",  # what a stopped trial has for what it is writing
    "TUNE_GLOBAL_CHECKPOINT_S": "600",  # nothing is restored from it
    "TUNE_WARN_THRESHOLD_S": "5",
    "RAY_AIR_NEW_OUTPUT": "0",
}
_ENDING_SECONDS = 30.0


class Session:
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
        seed: int,
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
        self._seed = seed
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
        self._asked = Asked(store.directory, lambda: hub.stop_trials.remote())
        self._watch.heed(self._asked)

    def run(self, searcher: Any, session: int, owner: Ownership) -> tuple[Status, str, BaseException | None]:
        left = self._total - sum(trial.status.is_over for trial in self._book.trials)
        problem: BaseException | None = None
        if left > 0:
            try:
                with self._interrupt_in_order(), owner.aborting(self._abort), self._asked.watching():
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
        if self._asked and sum(trial.status.is_over for trial in self._book.trials) < self._total:
            return Status.ABORTED, STOPPED_BY_REQUEST, None
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
        scheduler = make_scheduler(
            self._search,
            self._metric,
            self._mode,
            self._reasons,
            seed=self._seed,
            exploited=self._exploit,
            total=left,
            at_once=self._at_once,
            arrived=lambda *arrival: recorded.arrive(*arrival),  # made below: each wants the other
        )
        recorded = RecordedSearcher(
            searcher,
            self._book,
            self._metric,
            self._mode,
            lambda *names: self._hub.expect.remote(*names),  # a trial that begins before it is there waits for it
            scheduler.may_start if isinstance(scheduler, HyperBand) else lambda: True,
            lambda: bool(self._asked),
        )
        warnings.filterwarnings("ignore", message="Consider boosting PBT performance")  # not where trials are groups
        # Ray Tune's own limit counts trials that wait for others, too.
        limits_itself = isinstance(scheduler, HyperBand)
        analysis = tune.run(
            trial_function(self._hub),
            name=f"tune-{session:03d}",
            storage_path=directory.root,
            storage_filesystem=directory.portable_filesystem(),
            num_samples=left,
            resources_per_trial=tune.PlacementGroupFactory([_of_process(self._config.scaling)]),
            search_alg=recorded,
            scheduler=scheduler,
            stop=StopRules(self._search.stop, self._metric, self._mode, self._reasons, lambda: self._book.since_gain),
            callbacks=[self._watch],
            max_failures=self._config.failure.max_failures,
            max_concurrent_trials=None if limits_itself else self._at_once,
            # A group's process ends with its workers: one that waits to be used again would hold their CPUs.
            reuse_actors=self._config.scaling.workers == 1,
            raise_on_failed_trial=False,
            verbose=0,
        )
        self._watch.note_missed(analysis.trials)

    def _exploit(self, exploit: Exploit) -> Mapping[str, Any]:
        """A trial takes over another's state. It is on record before the trial goes on: so it will, whatever dies."""
        trial = self._book.take_over(exploit)
        config = trial_config(trial)
        self._hub.hold.remote(config["takeover"], self._book.run_id(trial.number))
        log.info("a trial takes over another's state", trial=trial.number, of=config["takeover"]["run_id"])
        return config

    def _end_the_rest(self, lost: bool) -> None:
        """Trials that Tune no longer runs and has not ended."""
        ending = self._watch
        for trial in self._book.trials:
            if trial.status is TrialStatus.RUNNING and not ending.is_ending(trial.number):
                if self._interrupted or lost or self._asked:
                    why = STOPPED_BY_REQUEST if self._asked else "interrupted"
                    ending.end(trial.number, TrialStatus.INTERRUPTED, why)
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


def _of_process(scaling: ScalingConfig) -> dict[str, float]:
    """What Ray Tune reserves for the process of a trial. One that only leads a group of workers takes nothing that
    these could want, Ray Train reserves what they need; but Tune's reservation can't be empty.
    """
    if scaling.workers > 1:
        return {"memory": 1}
    return per_worker(scaling) or {"CPU": 0.001}
