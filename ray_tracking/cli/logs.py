"""`ray-tracking logs RUN`: what the driver of a submitted run printed."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ray_tracking.cli.joining import KnownAddress, connect, locate
from ray_tracking.cli.options import ConfigFile, Debug, Environment, Run, StorageUri


def logs(
    run: Run = "latest",
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as it grows, until the job is over.")] = False,
    job: Annotated[
        int | None, typer.Option("--job", min=1, metavar="N", help="Of the run's Nth job; default: the newest.")
    ] = None,
    storage: StorageUri = None,
    config: ConfigFile = None,
    env: Environment = None,
    address: KnownAddress = None,
    debug: Debug = False,
) -> None:
    """Print the log of a submitted run.

    It is the driver's, with what the workers print.
    """
    from ray_tracking.errors import UsageError

    found = locate(run, storage, config, env, address)
    if not found.jobs:
        raise UsageError(
            f"The run {found.run_id} was not started by `submit`: no job has its log.",
            hint="What it printed went to the terminal it was started in. Ray's own logs are on its hosts, in "
            "/tmp/ray/session_latest/logs unless Ray has another --temp-dir.",
        )
    chosen = next((one for one in found.jobs if one.number == job), None) if job else found.newest
    if chosen is None:
        numbers = ", ".join(str(one.number) for one in found.jobs)
        raise UsageError(f"The run {found.run_id} has no job {job}.", hint=f"Its jobs: {numbers}.")
    client = connect(chosen.address)
    if not follow:
        sys.stdout.write(client.log(chosen.submission_id))
        return
    from ray_tracking.runtime.jobs.watching import Follower

    ended = Follower(client, chosen.submission_id, write, say).to_the_end()
    say(f"The job {chosen.submission_id} {'is lost: its cluster is gone' if ended is None else 'is ' + ended.status}.")


def write(text: str) -> None:
    """A part of a log, on stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def say(line: str) -> None:
    typer.echo(line, err=True)
