"""Trains a function on Ray workers, with its tracker, from start to a final record."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import ray

from ray_tracking.checkpoint import CheckpointStore, CheckpointStrategy, apply_retention
from ray_tracking.checkpoint.keys import Keyring, key_variables
from ray_tracking.config import Config, get_config, redact, with_overrides
from ray_tracking.errors import RayTrackingError, RefusedError, StorageError, UsageError
from ray_tracking.log import get_logger
from ray_tracking.runs import stopping
from ray_tracking.runs.record import Status
from ray_tracking.runs.resuming import changes, check_resumable, overrides_of
from ray_tracking.runs.store import RunStore, check_run_id, free_run_id, new_run_id
from ray_tracking.runs.sweep import SweepStore
from ray_tracking.runs.versions import installed_versions
from ray_tracking.runtime import cluster
from ray_tracking.runtime.actor import ActorTransport, forwarded_environment, start_actor
from ray_tracking.runtime.context import Run
from ray_tracking.runtime.launching import train_on_ray
from ray_tracking.runtime.nearby import forget_nearby
from ray_tracking.runtime.ownership import Ownership, own
from ray_tracking.runtime.result import Progress, RunResult
from ray_tracking.runtime.sweep.result import SweepProgress, SweepResult
from ray_tracking.runtime.target import load_target, ship_by_value
from ray_tracking.runtime.worker import WorkerTask
from ray_tracking.storage import Storage
from ray_tracking.tracking.spec import TrackerSpec, local_directory
from ray_tracking.tracking.syncing import sync_command
from ray_tracking.tracking.transport import TransportError

log = get_logger()

TrainFunction = Callable[[Run], Any]
Observer = Callable[[Progress], None]

_PROGRESS_SECONDS = 0.5


class TrainingManager:
    """Runs training functions as a config says.

    `config`: a Config, a mapping of overrides, or None for the defaults. `run_id`: of a new run, or of one that has not
    ended, which is continued; with `force_new` the run is a new one in any case, of another id if that one is taken:
    `manager.run_id` is its id then. `address`: of a Ray cluster; None for RAY_ADDRESS or a private local cluster.
    `observer` is called about twice a second, on a thread of its own.
    """

    def __init__(
        self,
        config: Config | Mapping[str, Any] | None = None,
        *,
        run_id: str | None = None,
        force_new: bool = False,
        address: str | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.config = config if isinstance(config, Config) else get_config(overrides=dict(config or {}))
        self.run_id = check_run_id(run_id or new_run_id(self.config.name))
        self._is_id_made_here = run_id is None
        self._force_new = force_new
        self.address = address
        self._observer = observer

    @classmethod
    def resume(
        cls,
        run_id: str,
        storage: str | None = None,
        *,
        train: TrainFunction | None = None,
        overrides: Mapping[str, Any] | None = None,
        address: str | None = None,
        observer: Observer | None = None,
    ) -> RunResult:
        """Go on with a run that has not been completed, from its storage alone: config and function are its own.

        `storage`: where runs lie (None: as configured). `train`: the function, where the record does not name it.
        `overrides` (dotted keys) go over the recorded configuration: another number of workers, say; secret values,
        which no record holds, are to be given so. What has changed since (code, versions, workers) is said in the log.
        Raises RefusedError for a completed run, UsageError for what is missing, and what `fit` raises.
        """
        runs = RunStore(Storage.open(storage or get_config().storage))
        record = runs.load(run_id)
        check_resumable(record, has_function=train is not None)
        given = dict(overrides or {})
        recorded = get_config(overrides=overrides_of(record, runs.storage.uri, given))
        config = with_overrides(recorded, given)
        entrypoint, digest = record.entrypoint, record.code_digest
        if train is None:
            loaded = load_target(record.entrypoint or "")
            ship_by_value(loaded)
            train, digest = loaded.function, loaded.digest
        versions = installed_versions()
        for change in changes(record, code_digest=digest, versions=versions, workers=config.scaling.workers):
            log.warning("resumed under other conditions", run=run_id, changed=change)
        manager = cls(config, run_id=run_id, address=address, observer=observer)
        return manager.fit(train, entrypoint=entrypoint, code_digest=digest)

    def fit(self, train: TrainFunction, *, entrypoint: str | None = None, code_digest: str | None = None) -> RunResult:
        """Train to the end. Blocks; call it from the main thread.

        Raises UsageError before anything starts if the function, the storage or the cluster can't do;
        LeaseHeldError, at once, if another process writes the run, LeaseLostError if one has taken over because this
        one was stopped or cut off for too long; RefusedError for a run that is completed; RunFailedError with the cause
        when training failed; RunStoppedError when somebody asked it to end early, KeyboardInterrupt when that was a
        signal.
        """
        started, began = time.monotonic(), time.time()
        _check_function(train)
        storage = Storage.open(self.config.storage)
        storage.probe()
        runs = RunStore(storage)
        Keyring.from_config(self.config.training.default.encryption)  # a key that can't be had is said now
        self._take_free_id(runs)
        try:
            with own(runs.directory(self.run_id), self.config.failure.lease_secs) as owner:
                return self._fit(train, entrypoint or _entrypoint(train), code_digest, runs, owner, started, began)
        finally:
            self._leave_no_trace(runs)

    def _fit(
        self,
        train: TrainFunction,
        entrypoint: str | None,
        code_digest: str | None,
        runs: RunStore,
        owner: Ownership,
        started: float,
        began: float,
    ) -> RunResult:
        storage, directory = runs.storage, runs.directory(self.run_id)
        first = self._first_attempt(runs)
        connected = cluster.connect(self.address, self.config.scaling)
        try:
            cluster.check(self.config.scaling, storage)
            stopping.clear(directory, began)
            spec = self._spec(storage, entrypoint, code_digest, owner.ticket)
            transport = ActorTransport(actor := start_actor(spec))
            try:
                environment = forwarded_environment(*key_variables(self.config.training.default.encryption))
                task = WorkerTask(self.run_id, storage.uri, self.config, train, actor, environment)
                with _Watch(transport, self.run_id, self._observer, started):
                    status, reason, error = train_on_ray(task, directory, first, owner)
                owner.check()  # if it raises, the run is another one's by now, and its end not ours to record
                try:
                    report = _close(transport, status, reason, sync_command(self.run_id, storage.uri))
                except StorageError as failure:
                    if error is None:
                        raise
                    log.error("the end of the run could not be recorded", error=str(failure))
                    raise error from failure
            finally:
                ray.kill(actor)
            forget_nearby(self.config.training.default.memory_copy, directory)
        finally:
            if connected:
                ray.shutdown()
        if error is not None:
            raise error
        owner.check()
        return self._result(directory, status, report)

    def _take_free_id(self, runs: RunStore) -> None:
        if self._force_new and runs.is_taken(self.run_id):
            taken, self.run_id = self.run_id, free_run_id(self.run_id, runs.is_taken)
            log.info("there is a run of this id already; this one gets another", taken=taken, run=self.run_id)

    def _leave_no_trace(self, runs: RunStore) -> None:
        """Of a run that was refused before it began, if nobody else can know its id."""
        with suppress(StorageError):
            if self._is_id_made_here and not runs.exists(self.run_id):
                runs.storage.delete_dir(self.run_id)

    def sweep(
        self,
        train: TrainFunction,
        *,
        entrypoint: str | None = None,
        code_digest: str | None = None,
        observer: Callable[[SweepProgress], None] | None = None,
    ) -> SweepResult:
        """Search over params as `config.sweep` says: many runs of the same function. Blocks; call it from the main
        thread. `run_id` is the sweep's; one that has not ended is gone on with. Raises as `fit` does.
        """
        from ray_tracking.runtime.sweep.manager import run_sweep

        _check_function(train)
        storage = Storage.open(self.config.storage)
        self._take_free_id(RunStore(storage))
        spec = self._spec(storage, entrypoint or _entrypoint(train), code_digest, lease=None)
        return run_sweep(self.config, spec, train, address=self.address, observer=observer)

    def _first_attempt(self, runs: RunStore) -> int:
        """The number of the next attempt, which names Ray's run directory: never one that Ray has used before."""
        if not runs.exists(self.run_id):
            return 1
        if SweepStore(runs, self.run_id).exists():
            raise RefusedError(
                f"{self.run_id!r} is a sweep, not a run.",
                hint=f"Go on with it: `ray-tracking resume {self.run_id}`; or choose another --run-id.",
            )
        record = runs.load(self.run_id)
        if record.status is Status.COMPLETED:
            raise RefusedError(
                f"The run {self.run_id!r} is completed.",
                hint="Choose another --run-id, or let --force-new (force_new=True) choose one for a new run.",
            )
        return record.attempts[-1].number + 1 if record.attempts else 1

    def _spec(
        self, storage: Storage, entrypoint: str | None, code_digest: str | None, lease: str | None
    ) -> TrackerSpec:
        strategy = self.config.training.default
        return TrackerSpec(
            self.run_id,
            self.config.name,
            storage.uri,
            local_directory(storage),
            tracking=self.config.experiment_tracking.to_dict(),
            config=redact(self.config.to_dict()),
            tags=redact(dict(self.config.tags)),
            monitor=strategy.monitor,
            mode=strategy.mode,
            entrypoint=entrypoint,
            code_digest=code_digest,
            log_level=self.config.logging.level,
            log_json=bool(self.config.logging["json"]),
            lease=lease,
        )

    def _result(self, directory: Storage, status: Status, report: Mapping[str, Any]) -> RunResult:
        store = CheckpointStore(directory)
        strategy = CheckpointStrategy.from_config(self.config.training.default)
        # Once more: rank 0's last pass may have come before the other ranks had finished the last checkpoint.
        apply_retention(store, strategy)
        infos = store.checkpoints()
        return RunResult(
            self.run_id,
            status.value,
            directory.uri,
            metrics=report["metrics"],
            best_checkpoint=strategy.best(infos),
            latest_checkpoint=max(infos, key=lambda info: info.order, default=None),
            attempts=report["attempts"],
            last_step=report["last_step"],
            backends=report["backends"],
        )


class _Watch:
    """Asks the tracker how training stands and tells the observer, while in the `with` block."""

    def __init__(self, transport: ActorTransport, run_id: str, observer: Observer | None, started: float) -> None:
        self._transport = transport
        self._run_id = run_id
        self._observer = observer
        self._started = started
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="ray-tracking-watch", daemon=True)

    def __enter__(self) -> None:
        if self._observer is not None:
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(5.0)

    def _look(self) -> None:
        assert self._observer is not None
        while not self._over.wait(_PROGRESS_SECONDS):
            try:
                status = self._transport.call("status", timeout=5.0)
            except (TransportError, RayTrackingError):
                continue  # it restarts; the next look finds it
            self._observer(progress_of(self._run_id, status, time.monotonic() - self._started))


def progress_of(run_id: str, status: Mapping[str, Any], elapsed: float) -> Progress:
    """The tracker's status as a Progress: the loss shown is the training loss, or the first metric called a loss."""
    position = status["progress"]
    metrics = status["metrics"]
    losses = [key for key in metrics if "loss" in key.lower()]
    key = next((key for key in losses if "train" in key.lower()), losses[0] if losses else None)
    return Progress(
        run_id,
        "training" if position.get("step") else "starting",
        position.get("step", 0),
        position.get("total_steps"),
        position.get("epoch", 0),
        position.get("total_epochs"),
        key,
        metrics[key] if key else None,
        elapsed,
        status["backends"],
    )


def _close(transport: ActorTransport, status: Status, reason: str, sync: str) -> dict[str, Any]:
    try:
        return dict(transport.call("close", status.value, redact(reason)))
    except TransportError as error:
        log.error(
            "the tracker could not end the run in order; what backends lack can be filled", error=str(error), fix=sync
        )
        return {"metrics": {}, "attempts": 1, "last_step": 0, "backends": {}}


def _check_function(train: Any) -> None:
    if not callable(train):
        raise UsageError(
            f"fit takes a training function, not {type(train).__name__}.",
            hint="Define `def train(run): ...`.",
        )
    try:
        inspect.signature(train).bind(object())
    except TypeError as error:
        name = getattr(train, "__qualname__", repr(train))
        raise UsageError(
            f"The training function {name}{inspect.signature(train)} can't be called with one argument.",
            hint="Define it as `def train(run): ...`; parameters come in run.params.",
        ) from error
    except ValueError:
        return  # a builtin without a signature; calling it will tell


def _entrypoint(train: TrainFunction) -> str | None:
    name = getattr(train, "__qualname__", None)
    return f"{train.__module__}:{name}" if name else None
