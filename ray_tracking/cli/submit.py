"""`ray-tracking submit train TARGET`: the same run, as a job on a cluster elsewhere."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from ray_tracking.cli.joining import JobsAddress, connect
from ray_tracking.cli.logs import say, write
from ray_tracking.cli.options import (
    ConfigFile,
    Debug,
    Environment,
    RunId,
    Settings,
    StorageUri,
    load_config,
    overrides_of,
)
from ray_tracking.cli.sending import (
    check_sent,
    driver_place,
    reachable_store,
    refuse_completed,
    sent_target,
    view_of,
)
from ray_tracking.extras import require

if TYPE_CHECKING:
    from ray_tracking.config import Config
    from ray_tracking.runs.store import RunStore
    from ray_tracking.runtime.capacity import DriverPlace
    from ray_tracking.runtime.jobs.client import Job, JobsClient
    from ray_tracking.runtime.jobs.request import JobRequest
    from ray_tracking.runtime.jobs.submitting import Plan
    from ray_tracking.runtime.retrying import Ending

group = typer.Typer(no_args_is_help=True, help="Run on a Ray cluster elsewhere, as a job of its own.")

_CHECK_SECONDS = 60.0


@group.command("train", short_help="Train TARGET as a job on a cluster.")
def train(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="module:function or path/file.py:function, in this folder.")
    ],
    address: JobsAddress = None,
    config: ConfigFile = None,
    env: Environment = None,
    settings: Settings = None,
    storage: StorageUri = None,
    run_id: RunId = None,
    follow: Annotated[
        bool | None,
        typer.Option("--follow/--no-follow", help="Show the job's log to its end; default: on a terminal."),
    ] = None,
    retries: Annotated[
        int,
        typer.Option(
            "--retries", min=0, metavar="N", help="Watch, and start again up to N times in a row without progress."
        ),
    ] = 0,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", metavar="PATTERN", help="Don't send this, a line of a .gitignore; repeatable."),
    ] = None,
    driver_cpus: Annotated[
        float,
        typer.Option("--driver-cpus", min=0, metavar="N", help="CPUs for the driver, which else runs on the head."),
    ] = 0.0,
    driver_resource: Annotated[
        list[str] | None,
        typer.Option("--driver-resource", metavar="NAME=AMOUNT", help="A Ray resource for the driver; repeatable."),
    ] = None,
    driver_label: Annotated[
        list[str] | None,
        typer.Option("--driver-label", metavar="KEY=VALUE", help="A node label for the driver; repeatable."),
    ] = None,
    python: Annotated[str, typer.Option("--python", metavar="CMD", help="Python on the cluster.")] = "python",
    debug: Debug = False,
) -> None:
    """Train TARGET as a job on a cluster, and show its log.

    This folder is sent along, without what .gitignore, .rayignore and --exclude name, .git, environments, caches, runs,
    and files that usually hold secrets (.env, *.pem, *.key). The config is checked here, and sent.

    Secrets are not sent: what goes with a job is visible on Ray's dashboard. Set them in the environment of the
    cluster's nodes before `ray start` (WANDB_API_KEY, AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_PASSWORD, the variable of
    encryption.key_env): the job's driver finds them there and hands them on to the workers and the tracker.

    The token of the cluster is taken from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.
    """
    require("ray", "ray")
    from ray_tracking.runs.store import check_run_id, new_run_id
    from ray_tracking.runtime.jobs.access import jobs_address
    from ray_tracking.runtime.target import find_target

    resolved = _resolve(load_config(config, env, overrides_of(settings, storage)))
    run = check_run_id(run_id or new_run_id(resolved.name))
    url = jobs_address(address, os.environ)
    place = driver_place(driver_cpus, driver_resource or [], driver_label or [])
    source = find_target(target)
    request = _request(run, sent_target(target, source), url, resolved, python)
    store = reachable_store(resolved.storage)
    refuse_completed(store, run)

    client = connect(url)
    plan = _plan(client, request, resolved, place, exclude or [], source, store, python=python, debug=debug)
    sent = _send(client, plan)
    commands = _commands(run, client.address, resolved.storage)
    if follow is None:
        follow = sys.stdout.isatty()
    if not follow and not retries:
        _await_start(client, sent.submission_id, python)
        typer.echo(f"{sent.submission_id}\n{commands}")
        return
    say(commands)
    from ray_tracking.runtime.jobs.submitting import follow_with_retries

    try:
        job, ending = follow_with_retries(
            client,
            sent.submission_id,
            plan,
            connect=lambda: connect(url),
            retries=retries,
            write=write if follow else None,
            say=say,
            view=view_of(store, run),
        )
    except KeyboardInterrupt:
        say(f"\nThe job goes on without this terminal.\n{commands}")
        raise
    _finish(job, ending, run, python)


def _resolve(config: Config) -> Config:
    """A path that means the same everywhere; the driver's own folder is gone after the job."""
    from ray_tracking.config import with_overrides
    from ray_tracking.storage import Storage

    if "://" in config.storage and not config.storage.startswith("file://"):
        return config
    return with_overrides(config, {"storage": Storage.open(config.storage).root})


def _request(run: str, target: str, url: str, config: Config, python: str) -> JobRequest:
    from ray_tracking.runs.versions import installed_versions
    from ray_tracking.runtime.jobs.request import JobRequest, check_length, check_no_secrets
    from ray_tracking.storage import without_credentials

    check_no_secrets(config, target, run, python)
    request = JobRequest(run, 0, target, without_credentials(url), config.to_dict(), installed_versions())
    check_length(request)
    return request


def _plan(
    client: JobsClient,
    request: JobRequest,
    config: Config,
    place: DriverPlace,
    exclude: Sequence[str],
    source: Path | None,
    store: RunStore | None,
    *,
    python: str,
    debug: bool,
) -> Plan:
    """Everything that the cluster and the folder say is looked at before anything is sent."""
    from ray_tracking.cli.output import size
    from ray_tracking.runtime.jobs.noted import noted_jobs
    from ray_tracking.runtime.jobs.package import check_size, choose
    from ray_tracking.runtime.jobs.submitting import Plan, check_cluster, check_idle
    from ray_tracking.storage import Storage

    runs = Storage.open(config.storage) if "://" not in config.storage else None
    package = choose(Path.cwd(), exclude, runs)
    known = [job.submission_id for job in noted_jobs(store.directory(request.run_id))] if store is not None else []
    plan = Plan(request, config, package, place, python, debug, known)
    check_idle(client, request.run_id)
    for difference in check_cluster(client, plan):
        say(f"Note: {difference}.")
    check_sent(source, package)
    check_size(package)
    largest = f", the largest {package.largest[0][0]} ({size(package.largest[0][1])})" if package.largest else ""
    say(f"Sending {package.directory}: {size(package.size)} in {len(package.files)} files{largest}.")
    return plan


def _send(client: JobsClient, plan: Plan) -> JobRequest:
    from ray_tracking.runtime.jobs.submitting import send

    sent = send(client, plan)
    say(f"Submitted {sent.submission_id} to {client.address}.")
    return sent


def _await_start(client: JobsClient, submission_id: str, python: str) -> None:
    """Wait for what would keep the job from starting. Raises, or exits as the job did, if something does."""
    from ray_tracking.runtime.jobs.request import CHECKED
    from ray_tracking.runtime.jobs.watching import own_words, refusal, until_checked

    job = until_checked(client, submission_id, _CHECK_SECONDS)
    log = client.log(submission_id)
    if job.is_over:
        if (error := refusal(job, log, python)) is not None:
            raise error
        if job.status != "SUCCEEDED":
            say("\n".join(own_words(log)).strip() or job.message)
            raise typer.Exit(job.exit_code if job.exit_code and job.exit_code > 0 else 1)
    elif CHECKED not in log:
        say(f"It has not started to train within {_CHECK_SECONDS:.0f} s; it is {job.status}.")


def _finish(job: Job | None, ending: Ending, run: str, python: str) -> NoReturn:
    from ray_tracking.errors import RunFailedError
    from ray_tracking.runtime.jobs.watching import refusal

    if job is None and ending.value == "completed":
        say(f"The run {run} is completed; its job was lost with its cluster after that.")
        raise typer.Exit
    if job is None:
        raise RunFailedError(
            f"The job of {run} was lost with its cluster.",
            hint="`ray-tracking submit train ... --run-id RUN` continues it on another; --retries N does so by itself.",
        )
    if (error := refusal(job, job.message, python)) is not None:
        raise error
    say(f"The job {job.submission_id} is {job.status}; the run {run} {_MEANING[ending.value]}.")
    raise typer.Exit({"completed": 0, "refused": job.exit_code or 2}.get(ending.value, 1))


_MEANING = {
    "completed": "is completed",
    "failed": "failed",
    "lost": "lost its driver",
    "stopped": "was stopped",
    "refused": "was refused",
}


def _commands(run: str, address: str, storage: str) -> str:
    from ray_tracking.storage import without_credentials

    place = "" if storage == os.path.abspath("runs") else f" --storage {shlex.quote(without_credentials(storage))}"
    rest = f"{shlex.quote(run)} --address {shlex.quote(address)}{place}"
    lines = (("Its log", "logs -f"), ("Its state", "status"), ("End it", "stop"))
    return "\n".join(f"{what + ':':<11}ray-tracking {command} {rest}" for what, command in lines)
