"""MLflow: one call per thousand metrics to a tracking server, one transaction to a database."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ray_tracking.errors import BackendError, BackendRefusedError
from ray_tracking.log import get_logger
from ray_tracking.records import Artifact, Kind, Record
from ray_tracking.tracking.backends.base import Backend, BackendIdentity, RunInfo
from ray_tracking.tracking.backends.media import artifact_file, param_of, param_text, storable, text_of
from ray_tracking.tracking.backends.mlflow_database import create_database
from ray_tracking.tracking.backends.mlflow_errors import answers, keep_answers, without_login
from ray_tracking.tracking.backends.mlflow_names import PARAM_LIMIT, TAG_LIMIT, Names, path_name
from ray_tracking.tracking.backends.mlflow_sql import Metric, SqlMetrics

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = get_logger()

_RUN_TAG = "ray_tracking.run_id"
_PARENT_TAG = "mlflow.parentRunId"
_STATUS = {"completed": "FINISHED", "failed": "FAILED"}  # all others: KILLED
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # its pages open on runs, not on LLM traces
_DEFAULTS = {
    # Delivery retries, with patience; the client's own two minutes and seven retries would only hide the failure.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


class MLflowBackend(Backend):
    """One MLflow run.

    Without `tracking_uri` (or MLFLOW_TRACKING_URI): `mlflow.db` and `mlflow-artifacts/` in the local directory.

    A record sent again changes nothing there: a metric's key includes its time, which is the record's.
    A param keeps its first value, as MLflow demands. Texts and images are artifacts `text/<key>/<step>.txt` and
    `images/<key>/<step>.png`. Artifacts named `model` or `model/...` are copied only with `log_models`.
    """

    name: ClassVar[str] = "mlflow"
    kinds: ClassVar[frozenset[Kind]] = frozenset(set(Kind) - {Kind.HISTOGRAM, Kind.ATTEMPT})
    max_records: ClassVar[int] = 2000

    def __init__(
        self, tracking_uri: str | None = None, experiment_name: str | None = None, log_models: bool = False
    ) -> None:
        self._tracking_uri = tracking_uri
        self._experiment_name = experiment_name
        self._log_models = log_models
        self._client: MlflowClient
        self._sql: SqlMetrics | None = None
        self._run_id = ""
        self._artifacts = ""
        self._ended: float | None = None
        self._names = Names()
        self._params: dict[str, str] = {}
        self._last: dict[str, tuple[int, int]] = {}
        self.changed_params = 0
        """How many changed values of params were not taken over."""

    def open(self, run: RunInfo, identity: BackendIdentity | None) -> BackendIdentity:
        for variable, value in _DEFAULTS.items():
            os.environ.setdefault(variable, value)
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        local = os.path.abspath(run.local_dir)
        uri = self._tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        artifact_location = None
        if not uri:
            os.makedirs(local, exist_ok=True)
            uri = f"sqlite:///{local}/mlflow.db"
            artifact_location = f"{local}/mlflow-artifacts"
        keep_answers()
        with answers(uri):
            if artifact_location is not None:
                create_database(f"{local}/mlflow.db", artifact_location)
            self._client = MlflowClient(uri)
            self._sql = SqlMetrics.of(self._client)
            found = self._find(run, identity, artifact_location)
            self._run_id = found.info.run_id
            if found.info.status != "RUNNING":
                self._client.update_run(self._run_id, status="RUNNING")
        self._artifacts, self._ended = run.artifacts, run.ended
        self._params = dict(found.data.params)
        self._names = Names(found.data.metrics, found.data.tags, folds_case=not uri.startswith("sqlite:"))
        return BackendIdentity(self._run_id, without_login(uri))

    def _find(self, run: RunInfo, identity: BackendIdentity | None, artifact_location: str | None) -> Any:
        """The run of an earlier open, or a new one. The tag finds a run whose identity was not saved in time."""
        experiment = self._experiment(self._experiment_name or run.name, artifact_location)
        if identity is not None and (known := self._get(identity.run_id)):
            return known
        if matching := self._search(experiment, run.run_id):
            return self._client.get_run(matching)
        own_tags = {_RUN_TAG: run.run_id}
        if run.sweep is not None:
            own_tags[_PARENT_TAG] = self._parent(experiment, run.sweep)
        tags = {key: storable(value, TAG_LIMIT) for key, value in run.tags.items()}
        made = self._client.create_run(
            experiment,
            start_time=None if run.started is None else int(run.started * 1000),
            tags=own_tags,
            run_name=storable(run.name or run.run_id, 250),
        )
        self._run_id = made.info.run_id
        self._log([], {}, tags)
        if run.config:
            self._client.log_dict(self._run_id, dict(run.config), "config.json")
        return self._client.get_run(self._run_id)

    def _search(self, experiment: str, run_id: str) -> str | None:
        """MLflow's id of a run of ours."""
        tag = run_id.replace("'", "''")
        matching = self._client.search_runs([experiment], f"tags.`{_RUN_TAG}` = '{tag}'", max_results=1)
        return str(matching[0].info.run_id) if matching else None

    def _parent(self, experiment: str, sweep: str) -> str:
        found = self._search(experiment, sweep)
        if found is None:
            raise BackendError(
                f"MLflow: the sweep {sweep!r}, of which this run is a trial, is not there yet.",
                hint=f"It comes with the sweep's own records; if not: ray-tracking sync {sweep}",
            )
        return found

    def _get(self, run_id: str) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            found = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return found if found.info.lifecycle_stage == "active" else None

    def _experiment(self, name: str, artifact_location: str | None) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(
                    self._client.create_experiment(name, artifact_location=artifact_location, tags=_EXPERIMENT_TAGS)
                )
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # made by another run a moment ago
                    raise
                found = self._client.get_experiment_by_name(name)
        if found is None or found.lifecycle_stage != "active":
            raise BackendRefusedError(
                f"MLflow: the experiment {name!r} was deleted.",
                hint="Restore it (mlflow experiments restore), or set experiment_tracking.mlflow.experiment_name.",
            )
        return str(found.experiment_id)

    def write(self, records: Sequence[Record]) -> None:
        params: dict[str, str] = {}
        tags: dict[str, str] = {}
        files: list[Record] = []
        for record in records:
            if record.kind is Kind.PARAM:
                self._take_param(params, record)
            elif record.kind is Kind.TAG:
                tags[self._name(record.key, tags)] = storable(text_of(record), TAG_LIMIT)
            elif record.kind is not Kind.SCALAR:
                files.append(record)
        last = dict(self._last)
        metrics = self._metrics(records, last, tags)
        with answers(self._client.tracking_uri):
            self._log(metrics, params, tags)
            self._names.remember()
            self._params |= params
            self._last = last
            for record in files:
                self._log_file(record)

    def _metrics(
        self, records: Sequence[Record], last: dict[str, tuple[int, int]], tags: dict[str, str]
    ) -> list[Metric]:
        """The scalars. One that repeats key and step within a millisecond goes a millisecond later, lest it vanish."""
        metrics = []
        names: dict[str, str] = {}
        for record in records:
            if record.kind is not Kind.SCALAR or record.value is None:
                continue
            step, stamp = record.step, max(int(record.time * 1000), 0)
            before = last.get(record.key)
            if before is not None and before[0] == step and stamp <= before[1]:
                stamp = before[1] + 1
            last[record.key] = (step, stamp)
            name = names.get(record.key)
            if name is None:
                name = names[record.key] = self._name(record.key, tags)
            metrics.append(Metric(name, record.value, stamp, step))
        return metrics

    def _name(self, key: str, tags: dict[str, str]) -> str:
        """The key's name in MLflow; a tag holds the original of one that had to be changed."""
        name, original = self._names(key)
        if original:
            tags.update(original)
        return name

    def _take_param(self, params: dict[str, str], record: Record) -> None:
        tags: dict[str, str] = {}
        name = self._name(record.key, tags)
        value = storable(param_text(param_of(record)), PARAM_LIMIT)
        known = self._params.get(name, params.get(name))
        if known is None:
            params[name] = value
        elif known != value:
            self.changed_params += 1
            if self.changed_params == 1:
                log.warning("MLflow can't change a param; the first value stays", param=record.key, stays=known)

    def _log(self, metrics: list[Metric], params: dict[str, str], tags: dict[str, str]) -> None:
        from mlflow.entities import Metric as Entity
        from mlflow.entities import Param, RunTag

        direct = self._sql
        self._client.log_batch(
            self._run_id,
            [] if direct else [Entity(*metric) for metric in metrics],
            [Param(key, value) for key, value in params.items()],
            [RunTag(key, value) for key, value in tags.items()],
        )
        if direct and not direct.write(self._run_id, metrics):
            self._client.log_batch(self._run_id, [Entity(*metric) for metric in metrics])  # says why not

    def _log_file(self, record: Record) -> None:
        if record.kind is Kind.ARTIFACT:
            self._log_artifact(record)
            return
        folder, suffix = ("text", "txt") if record.kind is Kind.TEXT else ("images", "png")
        with tempfile.TemporaryDirectory(prefix="ray-tracking-") as temporary:
            file = Path(temporary) / f"{record.step}.{suffix}"
            file.write_bytes(record.data or b"")
            self._client.log_artifact(self._run_id, str(file), f"{folder}/{path_name(record.key)}")

    def _log_artifact(self, record: Record) -> None:
        if not self._log_models and re.match(r"models?(/|$)", record.key):
            return
        with artifact_file(self._artifacts, record) as file:
            path = Artifact.decode(record.data or b"").path
            if file is None:
                log.warning("artifact is no longer on storage", backend=self.name, artifact=record.key, path=path)
                return
            self._client.log_artifact(self._run_id, str(file), os.path.dirname(path) or None)

    def close(self, status: str) -> None:
        if not self._run_id:
            return
        ended = time.time() if self._ended is None else self._ended
        with answers(self._client.tracking_uri):
            self._client.set_terminated(self._run_id, _STATUS.get(status, "KILLED"), end_time=int(ended * 1000))
