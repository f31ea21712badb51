"""`ray-tracking status [RUN]`: is it alive, how far is it, do the backends follow, how is its job."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_tracking.cli.joining import KnownAddress, connect, locate
from ray_tracking.cli.options import ConfigFile, Debug, Environment, Json, Run, StorageUri

if TYPE_CHECKING:
    from ray_tracking.runtime.jobs.noted import NotedJob


def status(
    run: Run = "latest",
    storage: StorageUri = None,
    config: ConfigFile = None,
    env: Environment = None,
    address: KnownAddress = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show how a run stands now: step, life, backends, job."""
    import time

    from ray_tracking.cli import output
    from ray_tracking.cli.runs import print_backends
    from ray_tracking.monitoring.overview import overview

    found = locate(run, storage, config, env, address, ask=False)
    job = _job(found.newest) if found.newest is not None else None
    if found.store is None:
        _show_job_alone(found.run_id, job, as_json=as_json)
        return
    now = time.time()
    view = overview(found.store, found.run_id, now)
    if as_json:
        document = view.to_json()
        shown = {key: document[key] for key in ("run_id", "name", "status", "last_step", "backends")}
        silent = round(now - view.alive, 1)
        rest = {"attempt": len(view.attempts), "alive": view.alive, "silent_seconds": silent}
        output.print_json(shown | rest | ({"job": job} if job is not None else {}))
        return
    screen = output.console()
    best = view.metrics.get(view.monitor or "")
    monitored = f"{output.number(best['last'])}, best {output.number(best['best'])}" if best else None
    facts = [
        ("run", view.run_id),
        ("status", view.status),
        ("step", view.last_step),
        ("attempt", len(view.attempts)),
        (view.monitor or "", monitored),
        ("last sign of life", f"{output.duration(now - view.alive)} ago"),
        ("job", _in_words(job)),
    ]
    screen.print(output.facts(facts))
    print_backends(screen, view)


def _job(noted: NotedJob) -> dict[str, str]:
    """The job as its cluster sees it now; `status` is "unknown" if that can't be asked, and `error` says why."""
    from ray_tracking.errors import UsageError

    known = {"submission_id": noted.submission_id, "address": noted.address}
    try:
        return {**known, "status": connect(noted.address).job(noted.submission_id).status}
    except UsageError as error:
        return {**known, "status": "unknown", "error": error.message}


def _in_words(job: dict[str, str] | None) -> str | None:
    if job is None:
        return None
    why = f" ({job['error']})" if "error" in job else ""
    return f"{job['submission_id']} at {job['address']}: {job['status']}{why}"


def _show_job_alone(run_id: str, job: dict[str, str] | None, *, as_json: bool) -> None:
    """Of a run whose storage can't be seen from here."""
    from ray_tracking.cli import output

    if as_json:
        output.print_json({"run_id": run_id, "status": "unknown", "job": job})
        return
    output.console().print(output.facts([("run", run_id), ("status", "unknown"), ("job", _in_words(job))]))
    output.console().print(output.cell("More is on its storage: name it with --storage where it can be seen."))
