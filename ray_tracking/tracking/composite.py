"""Trackers for plain scripts and notebooks: one journal, filled backends, no Ray."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Mapping
from typing import Any

from ray_tracking.config import ExperimentTrackingConfig, redact, section
from ray_tracking.errors import LeaseError, RayTrackingError, RefusedError, UsageError
from ray_tracking.log import configure_once, get_logger, is_json, level_name
from ray_tracking.runs.store import check_run_id, default_storage, new_run_id
from ray_tracking.storage import Storage
from ray_tracking.tracking.base import ExperimentTracker
from ray_tracking.tracking.child import ChildTransport
from ray_tracking.tracking.logger import RunLogger
from ray_tracking.tracking.sender import Sender
from ray_tracking.tracking.spec import TrackerSpec, local_directory
from ray_tracking.tracking.transport import TransportError

log = get_logger()

_CLOSE_SECONDS = 120.0
"""How long the tracker may take to compact the journal, after the time it gives the backends."""
_STATUSES = ("completed", "failed", "aborted")


class _Steps:
    """The steps of log calls that name none: metrics go one step on from the last ones, all else to their step."""

    def __init__(self, last: int, sender: Sender) -> None:
        self._before = last
        self._sender = sender

    @property
    def step(self) -> int:
        return self.here + 1

    @property
    def here(self) -> int:
        last = self._sender.last_step()
        return self._before if last is None else last


class CompositeTracker(ExperimentTracker):
    """Logs to a journal on the storage, from which a child process fills every enabled backend.

    `config` is the section `experiment_tracking`, as a mapping or validated; `storage` is where runs lie
    (default: RAY_TRACKING_STORAGE, else ./runs).
    """

    def __init__(
        self,
        config: ExperimentTrackingConfig | Mapping[str, Any] | None = None,
        *,
        storage: str | None = None,
    ) -> None:
        self.config = section(ExperimentTrackingConfig, config)
        self.run_id: str | None = None
        self._storage = storage or default_storage()
        self._sender: Sender | None = None
        self._transport: ChildTransport | None = None
        self._logger: RunLogger | None = None
        self._ended = False
        self._process = os.getpid()
        self._earlier_error: BaseException | None = None

    def init_experiment(
        self,
        name: str,
        config: Mapping[str, Any] | None = None,
        run_id: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> str:
        if self.run_id is not None:
            raise UsageError(
                f"This tracker already logs the run {self.run_id!r}.",
                hint="Call finalize_experiment() first, or make another tracker.",
            )
        run_id = check_run_id(run_id or new_run_id(name))
        configure_once()
        storage = Storage.open(self._storage)
        storage.probe()
        spec = TrackerSpec(
            run_id,
            name,
            storage.uri,
            local_directory(storage),
            tracking=self.config.model_dump(mode="json"),
            config=redact(dict(config or {})),
            tags=redact(dict(tags or {})),
            entrypoint=sys.argv[0] or None,
            log_level=level_name(),
            log_json=is_json(),
        )
        try:
            transport = ChildTransport(spec)
            try:
                self._begin(transport, spec, storage)
            except BaseException:
                transport.close()
                raise
        except TransportError as error:
            raise RayTrackingError(
                f"The run {run_id!r} can't be tracked: {error}",
                hint="What the tracker process wrote on stderr before says why.",
            ) from error
        atexit.register(self._at_exit)
        return run_id

    def _begin(self, transport: ChildTransport, spec: TrackerSpec, storage: Storage) -> None:
        resumed_from = self._resumed_from(transport)
        sender = Sender(transport, rank=0, attempt=transport.call("begin_attempt", 1))
        logger = RunLogger(sender, _Steps(max(resumed_from, 0), sender), storage.child(spec.run_id, "artifacts"))
        logger.begin_attempt(resumed_from)
        logger.log_params(_flat(spec.config))
        logger.log_tags(spec.tags)
        self._process = os.getpid()
        self._earlier_error = getattr(sys, "last_value", None)
        self._ended = False
        self.run_id, self._transport, self._sender, self._logger = spec.run_id, transport, sender, logger
        # The instance's attribute hides the method below: the hot path has no layer of its own.
        self.log_metrics = logger.log_metrics  # type: ignore[method-assign]

    @staticmethod
    def _resumed_from(transport: ChildTransport) -> int:
        """A plain script names its own steps: nothing of what is there is superseded."""
        last = int(transport.call("last_step"))
        return last if transport.call("has_history") else -1

    def _live(self) -> RunLogger:
        if self._logger is None:
            state = "has ended its run" if self._ended else "logs no run yet"
            raise UsageError(f"The tracker {state}.", hint='Call init_experiment("name") before you log.')
        return self._logger

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self._live().log_metrics(metrics, step)

    def log_params(self, params: Mapping[str, Any]) -> None:
        self._live().log_params(params)

    def log_histogram(self, key: str, values: Any, step: int | None = None) -> None:
        self._live().log_histogram(key, values, step)

    def log_text(self, key: str, text: str, step: int | None = None) -> None:
        self._live().log_text(key, text, step)

    def log_image(self, key: str, image: Any, step: int | None = None) -> None:
        self._live().log_image(key, image, step)

    def log_artifact(self, path: str | os.PathLike[str], name: str | None = None) -> None:
        self._live().log_artifact(path, name)

    def flush(self, timeout: float = 30.0) -> bool:
        self._live()
        assert self._sender is not None
        return self._sender.flush(timeout)

    def finalize_experiment(self, status: str = "completed") -> None:
        if status not in _STATUSES:
            raise UsageError(f"No such status: {status!r}.", hint=f"Allowed: {', '.join(_STATUSES)}.")
        if not self._ended:  # again, in a `finally` say, it changes nothing
            self._live()
            self._finish(status, "finalize_experiment()")

    def _finish(self, status: str, reason: str) -> None:
        assert self._sender is not None
        assert self._transport is not None
        atexit.unregister(self._at_exit)
        sender, transport, run_id = self._sender, self._transport, self.run_id
        self.run_id = self._sender = self._transport = self._logger = None
        self._ended = True
        del self.log_metrics
        try:
            sender.close()
            report = self._close_service(transport, status, reason)
        finally:
            transport.close()
        for name, backend in (report.get("backends") or {}).items():
            if backend["state"] != "complete":
                from ray_tracking.tracking.syncing import sync_command

                log.warning(
                    "backend has not got everything; the journal has",
                    backend=name,
                    pending=backend["pending"],
                    why=backend["error"],
                    fix=sync_command(run_id or "", Storage.open(self._storage).uri),
                )

    def _close_service(self, transport: ChildTransport, status: str, reason: str) -> dict[str, Any]:
        timeout = self.config.delivery.final_secs + _CLOSE_SECONDS
        for again in (True, False):  # once more if the tracker process has just died: it starts anew
            try:
                return dict(transport.call("close", status, reason, timeout=timeout))
            except LeaseError:
                raise
            except RefusedError:
                return {}  # it had closed the run just before it died
            except TransportError as error:
                log.warning("the tracker process failed at the end of the run", error=str(error), tried_again=again)
        return {}

    def _at_exit(self) -> None:
        """The script ended without finalize_experiment(): `failed` if by an exception, else `completed`.

        What sys.exit() was given is not known here; a script that ends so after a failure should say
        finalize_experiment("failed") itself.
        """
        if os.getpid() != self._process:
            return  # a fork of the script: the run is not its own
        error = getattr(sys, "last_value", None)
        try:
            if error is None or error is self._earlier_error:
                self._finish("completed", "the script ended")
            elif isinstance(error, KeyboardInterrupt):
                self._finish("aborted", "KeyboardInterrupt")
            else:
                self._finish("failed", _first_line(error))
        except RayTrackingError as failure:
            log.error("the run could not be ended in order", error=str(failure))


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested config as params with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


class _SingleTracker(CompositeTracker):
    """One backend, named by `_backend`, with its settings as keywords."""

    _backend: str

    def __init__(self, *, storage: str | None = None, **settings: Any) -> None:
        others = {name: {"enabled": False} for name in ("tensorboard", "wandb", "mlflow")}
        super().__init__({**others, self._backend: {"enabled": True, **settings}}, storage=storage)


class TensorBoardTracker(_SingleTracker):
    """TensorBoard alone: log_dir, update_freq, flush_secs."""

    _backend = "tensorboard"


class WandbTracker(_SingleTracker):
    """Weights & Biases alone: project, entity, tags, mode."""

    _backend = "wandb"


class MLflowTracker(_SingleTracker):
    """MLflow alone: tracking_uri, experiment_name, log_models."""

    _backend = "mlflow"
