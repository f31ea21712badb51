"""Sending a run to a cluster as a job, and sending it again when the job failed or the cluster was lost.

In: a `Plan`, a way to connect. Out: the job as it ended. Says what it does through `say`. Blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ray_tracking.config import Config
from ray_tracking.errors import RefusedError, RunFailedError
from ray_tracking.runtime.capacity import DriverPlace, check_capacity, unfit
from ray_tracking.runtime.jobs.agreement import check_release
from ray_tracking.runtime.jobs.client import Job, JobsClient, TakenError, UnreachableError
from ray_tracking.runtime.jobs.noted import next_number
from ray_tracking.runtime.jobs.package import Package
from ray_tracking.runtime.jobs.request import JobRequest, check_length
from ray_tracking.runtime.jobs.watching import Follower, Say, ending_of
from ray_tracking.runtime.retrying import Ending, decide

CLUSTER_SECONDS = 3600.0
"""How long a lost cluster is waited for."""
_SHORTEST_WAIT = 2.0
_LONGEST_WAIT = 15.0
_TRIES = 5

Connect = Callable[[], JobsClient]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is sent each time. `request` has no number yet; `known_ids`: submission ids that are taken elsewhere."""

    request: JobRequest
    config: Config
    package: Package
    driver: DriverPlace = field(default_factory=DriverPlace)
    python: str = "python"
    debug: bool = False
    known_ids: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class View:
    """What of the run can be seen from here; None where its storage can't be read from this machine."""

    status: Callable[[], str | None]
    step: Callable[[], int | None]
    """The step of its newest complete checkpoint."""
    is_stopped: Callable[[], bool] = lambda: False
    """Whether somebody has asked the run to end since."""


def check_idle(client: JobsClient, run_id: str) -> None:
    """Raise RefusedError if a job of this run goes on at the cluster."""
    for job in client.jobs_of(run_id):
        if not job.is_over:
            raise RefusedError(
                f"The run {run_id!r} is being run by the job {job.submission_id} at {client.address}, which is "
                f"{job.status}.",
                hint=f"Follow it with `ray-tracking logs {run_id} -f`, or end it with `ray-tracking stop {run_id}`.",
            )


def check_cluster(client: JobsClient, plan: Plan) -> list[str]:
    """What differs without harm. Raises UsageError if the cluster can't hold the run or has another release of Ray."""
    differ = check_release(plan.request.versions, {"ray": client.ray_version})
    check_capacity(plan.config.scaling, client.nodes(), plan.driver)
    return differ


def send(client: JobsClient, plan: Plan) -> JobRequest:
    """Upload and start. Returns the request with the number it was given."""
    check_idle(client, plan.request.run_id)
    taken = [job.submission_id for job in client.jobs_of(plan.request.run_id)]
    number = next_number(plan.request.run_id, [*taken, *plan.known_ids])
    for attempt in range(_TRIES):
        request = replace(plan.request, number=number + attempt)
        check_length(request)
        try:
            client.submit(
                entrypoint=request.entrypoint(plan.python, debug=plan.debug),
                submission_id=request.submission_id,
                runtime_env=runtime_env(plan, request),
                metadata=request.metadata,
                driver=plan.driver,
            )
        except TakenError:  # of a job that is not listed any more
            if attempt == _TRIES - 1:
                raise
        else:
            return request
    raise AssertionError("the last try returns or raises")


def runtime_env(plan: Plan, request: JobRequest) -> dict[str, Any]:
    return {
        "working_dir": plan.package.directory,
        "excludes": list(plan.package.excludes),
        "env_vars": request.environment,
    }


def follow_with_retries(
    client: JobsClient,
    submission_id: str,
    plan: Plan,
    *,
    connect: Connect,
    retries: int,
    write: Callable[[str], None] | None,
    say: Say,
    view: View,
) -> tuple[Job | None, Ending]:
    """Follow to the end; start again as `retrying.decide` says. Raises RunFailedError if the cluster stays away."""
    failures, best = 0, view.step()
    while True:
        follower = Follower(client, submission_id, write, say, *((CLUSTER_SECONDS,) if retries else ()))
        try:
            job = follower.to_the_end()
        except UnreachableError as error:
            raise RunFailedError(
                f"{client.address} has not answered for {follower.patience:.0f} s; whether the job {submission_id} "
                "goes on is not known.",
                hint="`ray-tracking logs RUN -f` looks again; with --retries N it is waited for, and started again.",
            ) from error
        ending = ending_of(job, view.status())
        step = view.step()
        progressed = step is not None and (best is None or step > best)
        best = step if progressed else best
        verdict = decide(ending, retries=retries, failures=failures, progressed=progressed)
        if not verdict.again:
            if retries and ending in (Ending.FAILED, Ending.LOST):
                say(f"Not started again: {verdict.why}.")
            return job, ending
        failures = verdict.failures
        reached = f", checkpoint at step {step}" if step is not None else ""
        say(f"{_ended(submission_id, job)}{reached}. Again in {verdict.wait:.0f} s: {verdict.why}.")
        time.sleep(verdict.wait)
        if view.is_stopped():
            say("Not started again: the run was asked to stop.")
            return job, Ending.STOPPED
        plan = replace(plan, known_ids=[*plan.known_ids, submission_id])  # a new cluster does not know of it
        client = wait_for_cluster(connect, plan, say)
        submission_id = send(client, plan).submission_id
        say(f"Started again as {submission_id}: it continues the run {plan.request.run_id}.")


def wait_for_cluster(connect: Connect, plan: Plan, say: Say, seconds: float = CLUSTER_SECONDS) -> JobsClient:
    """Until a cluster that can hold the run answers. Raises RunFailedError when it has been waited long enough.

    Other refusals (a token that is not taken) are raised at once.
    """
    end = time.monotonic() + seconds
    wait, said = _SHORTEST_WAIT, ""
    while True:
        try:
            client = connect()
            missing = unfit(plan.config.scaling, client.nodes(), plan.driver)
            if not missing:
                return client
            why = f"The cluster at {client.address} can't hold the run yet: {'; '.join(missing)}"
        except UnreachableError as error:
            why = error.message.split(": ")[0]
        if time.monotonic() > end:
            raise RunFailedError(
                f"{why}. Waited for {seconds / 60:.0f} minutes.", hint="Submit again when it is there."
            )
        if why != said:
            say(f"{why}. Waiting for it, up to {seconds / 60:.0f} minutes (Ctrl-C ends this).")
            said = why
        time.sleep(wait)
        wait = min(1.5 * wait, _LONGEST_WAIT)


def _ended(submission_id: str, job: Job | None) -> str:
    if job is None:
        return f"The job {submission_id} was lost with its cluster"
    if job.exit_code is None:
        return (
            f"The job {submission_id} ended without its driver: {(job.message.splitlines() or ['no reason'])[0][:200]}"
        )
    return f"The job {submission_id} failed (exit status {job.exit_code})"
