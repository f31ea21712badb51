"""The jobs of a run, found from its id: in its directory, or at the cluster if the storage can't be seen from here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ray_tracking.cli.options import open_store
from ray_tracking.extras import require

if TYPE_CHECKING:
    from ray_tracking.runs.store import RunStore
    from ray_tracking.runtime.jobs.client import JobsClient
    from ray_tracking.runtime.jobs.noted import NotedJob

JobsAddress = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="The cluster's dashboard, http://HOST:8265 [env: RAY_API_SERVER_ADDRESS, RAY_ADDRESS].",
    ),
]
KnownAddress = Annotated[
    str | None,
    typer.Option("--address", metavar="URL", help="The cluster's dashboard; default: where the run was submitted to."),
]


@dataclass(frozen=True, slots=True)
class Located:
    """A run and its jobs, oldest first. `store` is None if the run is only known at the cluster."""

    run_id: str
    store: RunStore | None
    jobs: Sequence[NotedJob]

    @property
    def newest(self) -> NotedJob | None:
        return self.jobs[-1] if self.jobs else None


def connect(address: str) -> JobsClient:
    """Raises UsageError: nothing answers there, or it does not let us in."""
    require("ray", "ray", "aiohttp", "requests")  # the last two come with ray[default], as we ask for it
    from ray_tracking.runtime.jobs.access import find_token
    from ray_tracking.runtime.jobs.client import JobsClient

    return JobsClient(address, find_token(os.environ))


def locate(
    run: str, storage: str | None, config: Path | None, env: str | None, address: str | None, *, ask: bool = True
) -> Located:
    """The run that `run` means, with its jobs. With an address the cluster is asked for what the storage does not tell
    (`ask`: also one in the environment). Raises UsageError."""
    from ray_tracking.errors import UsageError
    from ray_tracking.monitoring.select import select_run
    from ray_tracking.runtime.jobs.access import ADDRESS_VARIABLES, jobs_address
    from ray_tracking.runtime.jobs.noted import noted_jobs

    named = address or (ask and any(os.environ.get(name, "").startswith("http") for name in ADDRESS_VARIABLES))
    try:
        store = open_store(storage, config, env)
        run_id = select_run(store, run)
    except UsageError:
        if not named:
            raise
        return _ask(jobs_address(address, os.environ), run)
    jobs = noted_jobs(store.directory(run_id))
    if address is not None:
        checked = jobs_address(address, os.environ)
        if not jobs:
            jobs = list(_of_cluster(connect(checked), run_id))
        else:
            from dataclasses import replace

            jobs = [replace(job, address=checked) for job in jobs]
    return Located(run_id, store, jobs)


def _ask(address: str, run: str) -> Located:
    from ray_tracking.errors import UsageError
    from ray_tracking.monitoring.select import LATEST, match

    client = connect(address)
    every = client.jobs()
    if not every:
        raise UsageError(f"The cluster at {client.address} has run no job of ours.", hint="Name the --storage.")
    if run == LATEST:
        run_id = max(every, key=lambda job: job.started or 0.0).run_id or ""
    else:
        run_id = match(run, sorted({job.run_id or "" for job in every}), client.address)
    return Located(run_id, None, list(_of_cluster(client, run_id)))


def _of_cluster(client: JobsClient, run_id: str) -> Sequence[NotedJob]:
    from ray_tracking.runtime.jobs.noted import NotedJob

    return [
        NotedJob(job.submission_id, job.number, client.address, job.started or 0.0) for job in client.jobs_of(run_id)
    ]
