"""`ray-tracking stop RUN`: ends a run or sweep in order, with all its records and last checkpoints."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ray_tracking.cli.joining import KnownAddress, Located, connect, locate
from ray_tracking.cli.options import ConfigFile, Debug, Environment, Run, StorageUri

if TYPE_CHECKING:
    from ray_tracking.runs.store import RunStore
    from ray_tracking.runtime.jobs.noted import NotedJob

_POLL_SECONDS = 0.5
_REMOTE_SECONDS = 2.0
_SAY_SECONDS = 10.0
_JOB_SECONDS = 20.0


def stop(
    run: Run = "latest",
    timeout: Annotated[
        float, typer.Option("--timeout", min=0, metavar="SECONDS", help="How long to wait for its last checkpoint.")
    ] = 120.0,
    now: Annotated[bool, typer.Option("--now", help="End its job at once, without a last checkpoint.")] = False,
    storage: StorageUri = None,
    config: ConfigFile = None,
    env: Environment = None,
    address: KnownAddress = None,
    debug: Debug = False,
) -> None:
    """End a run in order, with a last checkpoint.

    Of a sweep, every trial under way saves one.
    It is `aborted` then, and can be resumed. The request is a file in the run's directory, so it works from wherever
    the storage can be written. A submitted run that does not end within --timeout has its job stopped.
    """
    found = locate(run, storage, config, env, address)
    if found.store is None or now:
        _stop_job(found, "at once" if now else "at once, for its storage can't be seen from here")
        return
    if not _is_running(found.store, found.run_id):
        return
    _ask(found.store, found.run_id)
    if _wait(found.store, found.run_id, timeout):
        return
    if found.newest is not None and _stop_job(found, f"because the run did not end within {timeout:.0f} s"):
        return
    from ray_tracking.errors import RunFailedError

    raise RunFailedError(
        f"The run {found.run_id} has not ended within {timeout:.0f} s; it is still asked to.",
        hint="A step may take longer than that: wait with another `stop`. To end it without a last checkpoint, "
        "interrupt it where it was started (Ctrl-C, SIGTERM).",
    )


def _is_running(store: RunStore, run_id: str) -> bool:
    """Says so if it is not."""
    from ray_tracking.cli.output import duration
    from ray_tracking.monitoring.overview import last_sign_of_life, status_now
    from ray_tracking.runs import stopping
    from ray_tracking.runs.summary import Summary

    record = store.load(run_id)
    alive = last_sign_of_life(record, Summary.load(store.directory(run_id)))
    status = status_now(record, alive, time.time())
    if status == "running":
        return True
    if status == "failed":
        # Whoever watches it (--retries) may be about to start it again. A start by hand is not held up by this.
        stopping.request(store.directory(run_id))
    silent = f": no sign of life for {duration(time.time() - alive)}" if status == "interrupted" else ""
    typer.echo(f"The run {run_id} is {status}{silent}. There is nothing to stop.")
    return False


def _ask(store: RunStore, run_id: str) -> None:
    from ray_tracking.runs import stopping
    from ray_tracking.runs.sweep import SweepStore

    stopping.request(store.directory(run_id))
    trials = " have its trials" if SweepStore(store, run_id).exists() else ""
    typer.echo(f"Asked {run_id} to{trials} save a checkpoint and end.", err=True)


def _wait(store: RunStore, run_id: str, timeout: float) -> bool:
    """Until the record says that the run has ended; False if the time ran out first."""
    from ray_tracking.cli.output import duration

    begun = said = time.monotonic()
    while True:
        record = store.load(run_id)
        if record.status.is_final:
            _tell_end(store, record)
            return True
        if time.monotonic() - begun >= timeout:
            return False
        if time.monotonic() - said >= _SAY_SECONDS:
            said = time.monotonic()
            typer.echo(f"Waiting for it to end: {_standing(store, run_id)}, {duration(said - begun)}.", err=True)
        time.sleep(_POLL_SECONDS if store.storage.is_local else _REMOTE_SECONDS)


def _standing(store: RunStore, run_id: str) -> str:
    from ray_tracking.runs.summary import Summary
    from ray_tracking.runs.sweep import SweepStore, TrialStatus

    sweep = SweepStore(store, run_id)
    if not sweep.exists():
        return f"step {Summary.load(store.directory(run_id)).last_step}"
    running = [trial for trial in sweep.load() if trial.status is TrialStatus.RUNNING]
    return f"{len(running)} trial{'s' * (len(running) != 1)} under way"


def _tell_end(store: RunStore, record: Any) -> None:
    from ray_tracking.checkpoint.store import CheckpointStore
    from ray_tracking.runs.sweep import SweepStore

    sweep = SweepStore(store, record.run_id)
    if sweep.exists():
        trials = sweep.load()
        over = sum(trial.status.is_over for trial in trials)
        text = f"The sweep {record.run_id} is {record.status.value}: {over} trials have ended"
        left = len(trials) - over
        typer.echo(f"{text}, {left} can be gone on with." if left else f"{text}.")
        if record.status.value != "completed":
            typer.echo(f"Go on with it:  ray-tracking resume {record.run_id}")
        return
    saved = max((info.step for info in CheckpointStore(store.directory(record.run_id)).checkpoints()), default=None)
    checkpoint = "no checkpoint" if saved is None else f"its last checkpoint is of step {saved}"
    typer.echo(f"The run {record.run_id} is {record.status.value}; {checkpoint}.")
    if record.status.value != "completed":
        typer.echo(f"Go on with it:  ray-tracking resume {record.run_id}")


def _stop_job(found: Located, why: str) -> bool:
    """Returns whether there was something to stop."""
    from ray_tracking.errors import UsageError

    if found.newest is None:
        raise UsageError(
            f"The run {found.run_id} is not run by a job, so there is none to stop.", hint="Leave out --now."
        )
    text, was_running = _ended(found.newest, why)
    typer.echo(text)
    return was_running


def _ended(job: NotedJob, why: str) -> tuple[str, bool]:
    client = connect(job.address)
    if not client.stop(job.submission_id):
        state = client.job(job.submission_id).status
        return f"The job {job.submission_id} was not running any more: it is {state}.", False
    end = time.monotonic() + _JOB_SECONDS
    while not (now := client.job(job.submission_id)).is_over and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)
    text = (
        f"The job {job.submission_id} was stopped {why}: it is {now.status}. What came after the run's newest "
        "checkpoint is trained again when it is resumed."
    )
    return text, True
