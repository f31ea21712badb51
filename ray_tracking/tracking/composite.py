"""Trackers for plain scripts and notebooks: one journal, filled backends, no Ray."""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from ray_tracking.config import ExperimentTrackingConfig, redact, section
from ray_tracking.errors import RayTrackingError, UsageError
from ray_tracking.log import configure, get_logger
from ray_tracking.runs.store import check_run_id, default_storage, new_run_id
from ray_tracking.storage import Storage
from ray_tracking.tracking.base import ExperimentTracker
from ray_tracking.tracking.child import ChildTransport
from ray_tracking.tracking.logger import RunLogger
from ray_tracking.tracking.sender import Sender
from ray_tracking.tracking.spec import TrackerSpec, local_directory
from ray_tracking.tracking.transport import TransportError

log = get_logger()

_STATUSES = ("completed", "failed", "aborted")


class _Steps:
    """Counts log_metrics calls that name no step: reading `step` goes on to the next one."""

    def __init__(self, last: int, sender: Sender) -> None:
        self._last = last
        self._sender = sender

    @property
    def step(self) -> int:
        self._last += 1
        return self._last

    @property
    def here(self) -> int:
        return self._sender.last_step()


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
        configure()
        storage = Storage.open(self._storage)
        storage.probe()
        run_id = check_run_id(run_id or new_run_id(name))
        spec = TrackerSpec(
            run_id,
            name,
            storage.uri,
            local_directory(storage),
            tracking=self.config.model_dump(mode="json"),
            config=redact(dict(config or {})),
            tags=redact(dict(tags or {})),
            entrypoint=sys.argv[0] or None,
        )
        transport = ChildTransport(spec)
        resumed_from = self._resumed_from(transport)
        sender = Sender(transport, rank=0, attempt=transport.call("begin_attempt", 1))
        logger = RunLogger(sender, _Steps(resumed_from, sender), storage.child(run_id, "artifacts"))
        logger.begin_attempt(resumed_from)
        logger.log_params(_flat(spec.config))
        logger.log_tags(spec.tags)
        self.run_id, self._transport, self._sender, self._logger = run_id, transport, sender, logger
        # The instance's attribute hides the method below: the hot path has no layer of its own.
        self.log_metrics = logger.log_metrics  # type: ignore[method-assign]
        atexit.register(self._at_exit)
        return run_id

    @staticmethod
    def _resumed_from(transport: ChildTransport) -> int:
        """A plain script names its own steps: nothing of what is there is superseded."""
        last = int(transport.call("last_step"))
        return last if transport.call("has_history") else -1

    def _live(self) -> RunLogger:
        if self._logger is None:
            raise UsageError("The tracker logs no run yet.", hint='Call init_experiment("name") first.')
        return self._logger

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self._live()

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
        self._live()
        self._finish(status, "finalize_experiment()")

    def _finish(self, status: str, reason: str) -> None:
        assert self._sender is not None
        assert self._transport is not None
        atexit.unregister(self._at_exit)
        self._sender.close()
        report = self._close_service(status, reason)
        self._transport.close()
        for name, backend in (report.get("backends") or {}).items():
            if backend["pending"]:
                log.warning(
                    "backend has not got everything; the journal has",
                    backend=name,
                    pending=backend["pending"],
                    why=backend["error"],
                )
        self.run_id = self._sender = self._transport = self._logger = None
        del self.log_metrics

    def _close_service(self, status: str, reason: str) -> dict[str, Any]:
        assert self._transport is not None
        for pause in (0.5, 0.0):  # once more if the tracker process has just died: it starts anew
            try:
                return dict(self._transport.call("close", status, reason))
            except TransportError as error:
                log.warning("the tracker process failed at the end of the run", error=str(error))
                time.sleep(pause)
        return {}

    def _at_exit(self) -> None:
        """The script ended without finalize_experiment(): `failed` if by an exception, else `completed`."""
        error = getattr(sys, "last_value", None)
        try:
            if error is None:
                self._finish("completed", "the script ended")
            else:
                self._finish("failed", f"{type(error).__name__}: {error}")
        except RayTrackingError as failure:
            log.error("the run could not be ended in order", error=str(failure))


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
