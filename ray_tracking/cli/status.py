"""`ray-tracking status [RUN]`: is it alive, how far is it, do the backends follow."""

from __future__ import annotations

from ray_tracking.cli.options import ConfigFile, Debug, Environment, Json, Run, StorageUri, open_store


def status(
    run: Run = "latest",
    storage: StorageUri = None,
    config: ConfigFile = None,
    env: Environment = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show how a run stands now: step, sign of life, backends."""
    import time

    from ray_tracking.cli import output
    from ray_tracking.cli.runs import print_backends
    from ray_tracking.monitoring.overview import overview
    from ray_tracking.monitoring.select import select_run

    store = open_store(storage, config, env)
    run_id = select_run(store, run)
    now = time.time()
    view = overview(store, run_id, now)
    if as_json:
        document = view.to_json()
        shown = {key: document[key] for key in ("run_id", "name", "status", "last_step", "backends")}
        silent = round(now - view.alive, 1)
        output.print_json(shown | {"attempt": len(view.attempts), "alive": view.alive, "silent_seconds": silent})
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
    ]
    screen.print(output.facts(facts))
    print_backends(screen, view)
