"""Trains a function on Ray workers, with its tracker, from start to a final record."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError

from ray_tracking.checkpoint import CheckpointStore, CheckpointStrategy, apply_retention
from ray_tracking.checkpoint.keys import Keyring, key_variables
from ray_tracking.config import Config, get_config, redact, with_overrides
from ray_tracking.errors import RayTrackingError, RefusedError, RunFailedError, UsageError
from ray_tracking.log import get_logger, is_debug
from ray_tracking.runs.record import Status
from ray_tracking.runs.resuming import changes, check_resumable, overrides_of
from ray_tracking.runs.store import RunStore, check_run_id, new_run_id
from ray_tracking.runs.versions import installed_versions
from ray_tracking.runtime import cluster
from ray_tracking.runtime.actor import ActorTransport, forwarded_environment, start_actor
from ray_tracking.runtime.callbacks import NoteFailures
from ray_tracking.runtime.context import Run
from ray_tracking.runtime.failures import Reason, reason_of
from ray_tracking.runtime.interrupts import InterruptibleTrainer, terminate_as_interrupt
from ray_tracking.runtime.result import Progress, RunResult
from ray_tracking.runtime.target import load_target, ship_by_value
from ray_tracking.runtime.worker import WorkerTask, work
from ray_tracking.storage import Storage
from ray_tracking.tracking.spec import TrackerSpec, local_directory
from ray_tracking.tracking.transport import TransportError

log = get_logger()

TrainFunction = Callable[[Run], Any]
Observer = Callable[[Progress], None]

_PROGRESS_SECONDS = 0.5


class TrainingManager:
    """Runs training functions as a config says.

    `config`: a Config, a mapping of overrides, or None for the defaults. `run_id`: of a new run, or of one that has not
    ended, which is continued. `address`: of a Ray cluster; None for RAY_ADDRESS or a private local cluster.
    `observer` is called about twice a second, on a thread of its own.
    """

    def __init__(
        self,
        config: Config | Mapping[str, Any] | None = None,
        *,
        run_id: str | None = None,
        address: str | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.config = config if isinstance(config, Config) else get_config(overrides=dict(config or {}))
        self.run_id = check_run_id(run_id or new_run_id(self.config.name))
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
        RefusedError for a run that is completed; RunFailedError with the cause when training failed.
        """
        started = time.monotonic()
        _check_function(train)
        storage = Storage.open(self.config.storage)
        storage.probe()
        runs = RunStore(storage)
        first = self._first_attempt(runs)
        Keyring.from_config(self.config.training.default.encryption)  # a key that can't be had is said now
        connected = cluster.connect(self.address, self.config.scaling)
        try:
            cluster.check(self.config.scaling, storage)
            spec = self._spec(storage, entrypoint or _entrypoint(train), code_digest)
            transport = ActorTransport(actor := start_actor(spec))
            environment = forwarded_environment(*key_variables(self.config.training.default.encryption))
            task = WorkerTask(self.run_id, storage.uri, self.config, train, actor, environment)
            with _Watch(transport, self.run_id, self._observer, started):
                status, reason, error = self._train(task, runs.directory(self.run_id), first)
            if status is not Status.ABORTED and (message := _hopeless(transport)):
                status, reason, error = Status.FAILED, message.splitlines()[0], UsageError(message)
            report = _close(transport, status, reason)
            ray.kill(actor)
        finally:
            if connected:
                ray.shutdown()
        if error is not None:
            raise error
        return self._result(runs.directory(self.run_id), status, report)

    def _first_attempt(self, runs: RunStore) -> int:
        """The number of the next attempt, which names Ray's run directory: never one that Ray has used before."""
        if not runs.exists(self.run_id):
            return 1
        record = runs.load(self.run_id)
        if record.status is Status.COMPLETED:
            raise RefusedError(
                f"The run {self.run_id!r} is completed.",
                hint="Choose another --run-id, or leave it out for a new one.",
            )
        return record.attempts[-1].number + 1 if record.attempts else 1

    def _spec(self, storage: Storage, entrypoint: str | None, code_digest: str | None) -> TrackerSpec:
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
        )

    def _train(self, task: WorkerTask, directory: Storage, first: int) -> tuple[Status, str, BaseException | None]:
        scaling = self.config.scaling
        trainer = InterruptibleTrainer(
            work,
            train_loop_config={"task": task},
            scaling_config=ScalingConfig(
                num_workers=scaling.workers,
                use_gpu=scaling.use_gpu,
                resources_per_worker=dict(scaling.resources_per_worker) or None,
            ),
            run_config=RunConfig(
                name=f"attempt-{first:03d}",
                storage_path=directory.root,
                storage_filesystem=directory.portable_filesystem(),
                failure_config=FailureConfig(max_failures=self.config.failure.max_failures),
                callbacks=[NoteFailures(task.actor)],
                # What goes wrong is said by us, with its cause; the whole of Ray's account is in its log files.
                logging_config=LoggingConfig("INFO" if is_debug() else "CRITICAL"),
            ),
        )
        try:
            with terminate_as_interrupt():
                trainer.fit()
        except TrainingFailedError as error:
            return self._failed(reason_of(error))
        except RayError as error:
            return self._failed(Reason(f"Ray's controller or cluster died: {str(error).strip().splitlines()[0]}"))
        except KeyboardInterrupt as error:
            trainer.abort()
            return Status.ABORTED, "interrupted", error
        return Status.COMPLETED, "completed", None

    def _failed(self, reason: Reason) -> tuple[Status, str, BaseException]:
        where = f"\n\n{reason.traceback}\n" if reason.traceback else ""
        error = RunFailedError(
            f"The run {self.run_id} failed: {reason.summary}{where}",
            hint=f"What it logged and its checkpoints are kept: `ray-tracking runs show {self.run_id}`.",
        )
        return Status.FAILED, reason.summary, error

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


def _hopeless(transport: ActorTransport) -> str | None:
    """What the training function refused, if that is why it ended."""
    try:
        message: str | None = transport.call("hopeless")
        return message
    except TransportError:
        return None


def _close(transport: ActorTransport, status: Status, reason: str) -> dict[str, Any]:
    try:
        return dict(transport.call("close", status.value, redact(reason)))
    except TransportError as error:
        log.error("the tracker could not end the run in order; `sync` fills what backends lack", error=str(error))
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
