"""The sweep's one sink: an actor that tracks the sweep and all of its trials, and knows which trial is which.

In: what senders in the trials log; trials that begin, report and end. Out: a TrackerService per run that is under way,
closed and let go when it ends, so that memory and open files do not grow with the number of trials.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import cloudpickle
import ray

from ray_tracking.checkpoint import CheckpointStore
from ray_tracking.config.merging import merge
from ray_tracking.errors import RefusedError
from ray_tracking.log import bind, configure, get_logger
from ray_tracking.records import Kind
from ray_tracking.runs.store import RunStore
from ray_tracking.runs.sweep import SweepStore
from ray_tracking.runtime.sweep.holding import Takeover, hold
from ray_tracking.runtime.sweep.mailbox import Answer, Mailbox, Number
from ray_tracking.storage import Storage
from ray_tracking.tracking.cursor import BackendState
from ray_tracking.tracking.priority import stand_back
from ray_tracking.tracking.service import TrackerService
from ray_tracking.tracking.spec import TrackerSpec
from ray_tracking.tracking.transport import pack

log = get_logger()

_NAME_SECONDS = 10.0
_NAME_LOOK_SECONDS = 0.05
_TRIALS_PER_COLLECTION = 8
_YIELD_SECONDS = 0.2
"""What a trial that has ended gives to the one that begins in its place: closing a run keeps this process busy."""


class Begun(NamedTuple):
    """What a trial is told when it begins."""

    run_id: str
    task: bytes
    """The worker's task, pickled; run id, params and tracker are the trial's own to fill in."""
    since: float
    """Tells this start of the trial from others, for `rest`."""
    attempt: int | None
    """Begun for it already; None: that is left to its workers."""
    with_state: bool = False
    """Whether reports wait for the checkpoint that belongs to them."""


class _Live(NamedTuple):
    """A trial under way. `actor`: Ray Tune's, pickled: to unpickle it imports torch and Ray Train."""

    actor: bytes
    position: Any
    changed: float
    since: float


class SweepHub:
    """Methods run on several threads. `call` and `append` are what `ActorTransport` needs of a tracker actor."""

    def __init__(
        self,
        sweep: str,
        trial: str,
        environment: Mapping[str, str],
        task: bytes,
        *,
        in_group: bool = False,
        with_state: bool = False,
    ) -> None:
        """`sweep`: TrackerSpec of the sweep's own run; `trial`: that of a trial, without run id and params.

        `in_group`: trials are groups of workers.
        """
        for name, value in environment.items():
            os.environ.setdefault(name, value)
        self._idle = stand_back()
        self._sweep, self._trial = TrackerSpec.from_json(sweep), TrackerSpec.from_json(trial)
        # What each trial's backends say of themselves would be said once per trial.
        configure("warning" if self._sweep.log_level == "info" else self._sweep.log_level, json=self._sweep.log_json)
        bind(run=self._sweep.run_id)
        self._task = task
        self._in_group = in_group
        self._with_state = with_state
        self._runs = RunStore(Storage.open(self._sweep.storage))
        self._opening = threading.Lock()
        self._noting = threading.Lock()
        self._resting = threading.Condition()
        self._making: dict[str, threading.Lock] = {}
        self._services: dict[str, TrackerService] = {}
        self._ended: dict[str, dict[str, Any]] = {}
        self._names: dict[str, str] = {}
        self._live: dict[str, _Live] = {}
        self._causes: dict[str, str] = {}
        """Of trials that would fail again."""
        self._mail: dict[str, Mailbox] = {}
        self._reasons: dict[str, str] = {}
        self._own: TrackerService | None = None
        self._is_stopping = False
        self._awaited = threading.Event()

    def ready(self) -> int:
        """Begin a session of the sweep: its run's attempts are its sessions. Raises what TrackerService raises.

        Not done in the constructor: an actor that fails to be made does not tell its callers why.
        """
        return self._parent().begin_attempt(1)

    # --- trials -----------------------------------------------------------------------------------------------------

    def expect(self, tune_id: str, run_id: str) -> None:
        """The driver has proposed a trial."""
        self._names[tune_id] = run_id

    def begin(self, tune_id: str, params: Mapping[str, Any], actor: bytes, *, is_ready: bool) -> Begun:
        """A trial, or its next try, begins in the process of `actor` (see _Live). `is_ready`: its attempt may begin."""
        run_id = self._name(tune_id)
        if cause := self._causes.get(run_id):
            raise RefusedError(cause)
        workers = 1 if is_ready and not self._in_group else None
        service = self._service(run_id, params, workers)
        self._mail[run_id] = Mailbox()
        now = time.monotonic()
        self._live[run_id] = _Live(actor, None, now, now)
        attempt = None if workers is None else service.begin_attempt(workers)
        return Begun(run_id, self._task, now, attempt, self._with_state)

    def rest(self, run_id: str, since: float) -> None:
        """The trial has nothing left to write: it is over, or Ray Tune has ended it, perhaps only until it goes on."""
        with self._resting:
            live = self._live.get(run_id)
            if live is not None and live.since == since:
                self._live.pop(run_id, None)
            self._resting.notify_all()

    def _name(self, tune_id: str) -> str:
        """The trial's run id. What the driver expects may be on its way; what this actor knew before it died is in the
        trials' records.
        """
        store, end = SweepStore(self._runs, self._sweep.run_id), time.monotonic() + _NAME_SECONDS
        while (run_id := self._names.get(tune_id)) is None:
            found = next((trial for trial in store.load() if trial.tune_id == tune_id), None)
            if found is not None:
                return store.run_id(found.number)
            if time.monotonic() > end:
                raise RefusedError(f"The sweep {self._sweep.run_id} knows no trial {tune_id}.")
            time.sleep(_NAME_LOOK_SECONDS)
        return run_id

    def _is_sweep_open(self) -> bool:
        """Backends that show trials below their sweep take them more readily when that is there."""
        return BackendState.STARTING.value not in self._parent().status()["backends"].values()

    def hold(self, takeover: Mapping[str, Any], run_id: str) -> None:
        """The trial will take over another's state: that must not be deleted until then."""
        service = self._services.get(run_id)
        if service is not None:  # now: its next attempt begins soon
            service.close_attempt(f"takes over the state of {takeover['run_id']}")
        hold(self._runs, Takeover(**takeover), run_id)

    def failed(self, run_id: str, reason: str, hopeless: bool) -> None:
        """The trial's function raised. `hopeless`: it would again."""
        self._reasons[run_id] = reason
        if hopeless:
            self._causes[run_id] = reason
        self._service(run_id).end_attempt(reason)

    def stop_trials(self) -> None:
        """Ask every trial under way, and every one that still begins, to save a last checkpoint and end."""
        self._is_stopping = True
        for service in list(self._services.values()):
            service.request_stop()

    def why_failed(self, run_id: str) -> str | None:
        """What the trial's function raised since this was last asked, or that it hung; None: it died without a word."""
        return self._reasons.pop(run_id, None) or self._causes.get(run_id)

    def end(self, run_id: str, status: str, reason: str, seconds: float = 0.0) -> dict[str, Any]:
        """The trial's run is over: deliver, close, let go. Again: the same answer.

        `seconds`: how long to wait for a trial that is still saving when Ray Tune ends it.
        """
        if run_id in self._ended:
            return self._ended[run_id]
        with self._resting:
            self._resting.wait_for(lambda: run_id not in self._live, seconds)
        self._awaited.wait(_YIELD_SECONDS)
        report = self._service(run_id).close(status, reason)
        with self._opening:
            self._services.pop(run_id, None)
            self._making.pop(run_id, None)
            self._live.pop(run_id, None)
            self._ended[run_id] = {"metrics": report["metrics"], "last_step": report["last_step"]}
            due = len(self._ended) % _TRIALS_PER_COLLECTION == 0
        if due:
            _forget_the_dead()
        return self._ended[run_id]

    def hasten(self) -> None:
        """No trial is left to begin: the driver waits for what ends."""
        self._awaited.set()

    def drop_checkpoints(self, run_id: str) -> int:
        """The trial is not among the best: its checkpoints go, but for pinned ones. Returns how many went."""
        store = CheckpointStore(self._runs.directory(run_id))
        doomed = [found.folder for found in store.scan() if found.info is None or not found.info.pinned]
        for folder in doomed:
            store.delete(folder)
        return len(doomed)

    def end_if_still(self, seconds: float) -> None:
        """End trials that have got no step further for so long; `why_failed` says so."""
        now = time.monotonic()
        for run_id, live in list(self._live.items()):
            if now - live.changed >= seconds:
                self._reasons[run_id] = reason = f"hung: no step further for {seconds:g} s"
                self._live.pop(run_id, None)
                if self._in_group:  # killed, its process could not give back what its workers hold
                    self._box(run_id).fail(reason)
                else:
                    ray.kill(cloudpickle.loads(live.actor))

    # --- between rank 0 of a group and the trial's own process ------------------------------------------------------

    def report(self, run_id: str, number: Number, result: Any, seconds: float) -> Answer | None:
        return self._box(run_id).report(number, result, seconds)

    def next_report(self, run_id: str, after: Number, seconds: float) -> tuple[Number, Any] | None:
        return self._box(run_id).next(after, seconds)

    def waits_for_answer(self, run_id: str) -> bool:
        return self._box(run_id).is_waiting

    def end_reports(self, run_id: str, seconds: float) -> bool:
        return self._box(run_id).end(seconds)

    def reports_ended(self, run_id: str) -> None:
        self._box(run_id).ended()

    def _box(self, run_id: str) -> Mailbox:
        with self._opening:  # after this actor has died it is a new one
            return self._mail.setdefault(run_id, Mailbox())

    # --- the sweep's own run ----------------------------------------------------------------------------------------

    def note(self, step: int, metrics: Mapping[str, float]) -> None:
        """Into the sweep's own journal, at the number of trials that have ended."""
        with self._noting:  # one after the other: what comes with an earlier sequence passes for a repetition
            sequence = time.time_ns() // 1000  # grows over restarts of this actor, too
            event = (sequence, Kind.SCALAR.value, step, time.time(), dict(metrics))
            session = self._runs.load(self._sweep.run_id).attempts[-1].number
            self._parent().append(0, session, pack([event]))

    def close(self, status: str, reason: str) -> dict[str, Any]:
        return self._parent().close(status, reason)

    def _parent(self) -> TrackerService:
        with self._opening:
            if self._own is None:
                self._own = TrackerService(self._sweep, alone=False, idle=self._idle)
        return self._own

    def standing(self) -> dict[str, dict[str, Any]]:
        """Step and newest metrics of the trials under way, by run id."""
        found = {}
        for run_id, service in list(self._services.items()):
            status = service.status()
            found[run_id] = {"step": status["last_step"], "metrics": status["metrics"]}
        return found

    # --- what senders call ------------------------------------------------------------------------------------------

    def append(self, run_id: str, rank: int, attempt: int, batch: bytes) -> int:
        return self._service(run_id).append(rank, attempt, batch)

    def call(self, run_id: str, method: str, *arguments: Any) -> Any:
        if method == "report_progress":
            if run_id in self._ended:
                return True  # its process is about to be ended
            live = self._live.get(run_id)
            if live is not None and live.position != arguments[0]:
                self._live[run_id] = live._replace(position=arguments[0], changed=time.monotonic())
        return getattr(self._service(run_id), method)(*arguments)

    def _service(
        self, run_id: str, params: Mapping[str, Any] | None = None, workers: int | None = None
    ) -> TrackerService:
        """Made at its first use, which may wait for a lease: the other trials' calls must not wait with it."""
        service, making = self._known(run_id)
        if service is None:
            with making:
                service, _ = self._known(run_id)
                if service is None:
                    spec = self._spec(run_id, params)
                    service = TrackerService(
                        spec, alone=False, idle=self._idle, may_open=self._is_sweep_open, workers=workers
                    )
                    if self._is_stopping:
                        service.request_stop()
                    with self._opening:
                        self._services[run_id] = service
        return service

    def _known(self, run_id: str) -> tuple[TrackerService | None, threading.Lock]:
        with self._opening:
            if run_id in self._ended:
                raise RefusedError(f"The trial {run_id} has ended.")
            return self._services.get(run_id), self._making.setdefault(run_id, threading.Lock())

    def _spec(self, run_id: str, params: Mapping[str, Any] | None) -> TrackerSpec:
        config = self._trial.config
        if params is not None:
            config = {**config, "params": merge(config.get("params", {}), params)}
        elif self._runs.exists(run_id):  # this actor was started again
            config = dict(self._runs.load(run_id).config)
        return replace(
            self._trial, run_id=run_id, name=f"{self._trial.name} {run_id.rpartition('.')[2]}", config=config
        )


def _forget_the_dead() -> None:
    """Each tracker that starts leaves all objects that there are out of later collections (see `settle`), those of
    other trials with them: what of these is garbage by now would stay for good.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
