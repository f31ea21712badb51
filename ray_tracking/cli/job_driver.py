"""The command that a submitted job runs on the cluster: trains the run that it was sent for. Not for people."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ray_tracking.cli.options import Debug

if TYPE_CHECKING:
    from ray_tracking.errors import LeaseHeldError
    from ray_tracking.runtime.jobs.request import JobRequest
    from ray_tracking.runtime.result import Progress, RunResult
    from ray_tracking.storage import Storage

_LEASE_TRIES = 3
"""Who still holds it then has renewed it: it lives."""


def job_driver(
    target: Annotated[str, typer.Argument(metavar="TARGET")],
    run_id: Annotated[str, typer.Option("--run-id", metavar="ID")],
    debug: Debug = False,
) -> None:
    """Train as `submit` has asked. Its config comes in the environment, its secrets from the node's environment."""
    from ray_tracking.cli.progress import ProgressView
    from ray_tracking.cli.train import print_result
    from ray_tracking.config import Config
    from ray_tracking.config.problems import Layer, validate
    from ray_tracking.errors import RunStoppedError, UsageError
    from ray_tracking.log import configure, get_logger
    from ray_tracking.runs.versions import installed_versions
    from ray_tracking.runtime import cluster
    from ray_tracking.runtime.jobs.agreement import check_release
    from ray_tracking.runtime.jobs.request import STOPPED, VARIABLE, JobRequest
    from ray_tracking.runtime.target import load_target, ship_by_value
    from ray_tracking.storage import Storage

    sent = os.environ.pop(VARIABLE, None)
    if sent is None:
        raise UsageError("This is the driver of a submitted job.", hint="Use `ray-tracking submit train TARGET`.")
    request = JobRequest.from_json(sent)
    config = validate(Config, [Layer("the job's config", dict(request.config))])
    configure("debug" if debug else config.logging.level, json=config.logging.json)
    for difference in check_release(request.versions, installed_versions()):
        get_logger().warning("other versions than where it was submitted", differs=difference)
    storage = Storage.open(config.storage)
    storage.probe()
    # What can refuse the run comes before what imports torch, which takes seconds: somebody may be waiting for it.
    cluster.connect(None, config.scaling)
    cluster.check(config.scaling, storage)
    loaded = load_target(target)

    from ray_tracking.runtime.trainer import TrainingManager

    ship_by_value(loaded)
    with ProgressView() as view:
        observer = _FirstSign(request, storage, view.report)

        def fit() -> RunResult:
            manager = TrainingManager(config, run_id=run_id, observer=observer)
            return manager.fit(loaded.function, entrypoint=target, code_digest=loaded.digest)

        try:
            result = _patiently(fit) if request.takes_over else fit()
        except RunStoppedError as error:
            # told apart from a failure by who watches the job, who may not see the storage
            typer.echo(str(error), err=True)
            raise typer.Exit(STOPPED) from None
    print_result(result, storage)


class _FirstSign:
    """The first report of a run means that the cluster was found fit and the run is ours: that is said and noted."""

    def __init__(self, request: JobRequest, storage: Storage, report: Any) -> None:
        self._request, self._storage, self._report = request, storage, report
        self._told = False

    def __call__(self, progress: Progress) -> None:
        if not self._told:
            self._told = True
            self._tell()
        self._report(progress)

    def _tell(self) -> None:
        from ray_tracking.errors import StorageError
        from ray_tracking.log import get_logger
        from ray_tracking.runs.store import RunStore
        from ray_tracking.runtime.jobs.noted import NotedJob, note_job
        from ray_tracking.runtime.jobs.request import CHECKED

        request = self._request
        job = NotedJob(request.submission_id, request.number, request.address, time.time())
        try:
            note_job(RunStore(self._storage).directory(request.run_id), job)
        except StorageError as error:
            get_logger().warning("the job can't be noted: `logs` and `stop` need --address", error=str(error))
        typer.echo(CHECKED)


def _patiently(fit: Any) -> RunResult:
    """A driver that died with its host has left its lease, which runs out."""
    from ray_tracking.errors import LeaseHeldError
    from ray_tracking.log import get_logger

    for left in reversed(range(_LEASE_TRIES)):
        try:
            result: RunResult = fit()
        except LeaseHeldError as error:
            if not left:
                raise
            _wait_for(error, get_logger())
        else:
            return result
    raise AssertionError("the last try returns or raises")


def _wait_for(error: LeaseHeldError, log: Any) -> None:
    wait = min(error.expires_in + 1.0, 60.0)
    log.info("the lease of the driver before this one has to run out", seconds=round(wait))
    time.sleep(wait)
