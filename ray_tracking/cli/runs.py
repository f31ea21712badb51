"""`ray-tracking runs ls|show|compare`: the runs of a storage, read from what they left there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ray_tracking.cli.options import ConfigFile, Debug, Environment, Json, Run, StorageUri, open_store

if TYPE_CHECKING:
    from rich.console import Console

    from ray_tracking.monitoring.compare import Comparison
    from ray_tracking.monitoring.overview import Overview

group = typer.Typer(no_args_is_help=True, help="List, show and compare runs.")


@group.command("ls")
def ls(
    limit: Annotated[int, typer.Option("-n", "--limit", min=1, help="At most so many, the newest.")] = 50,
    storage: StorageUri = None,
    config: ConfigFile = None,
    env: Environment = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the runs, newest first."""
    import time

    from ray_tracking.cli import output
    from ray_tracking.monitoring.listing import run_lines

    store = open_store(storage, config, env)
    now = time.time()
    every = run_lines(store, now)
    lines = every[:limit]
    if as_json:
        output.print_json([line.to_json() for line in lines])
        return
    screen = output.console()
    if not lines:
        screen.print(output.cell(f"No runs in {store.storage.uri} yet. Start one with `ray-tracking demo`."))
        return
    rows = [
        (
            line.run_id,
            line.status,
            line.last_step,
            "-" if line.best is None else f"{line.monitor} {output.number(line.best)}",
            output.duration(now - line.created) if line.created else "-",
        )
        for line in lines
    ]
    screen.print(output.table("", ("run", "status", "step", "best", "age"), rows, right=("step", "age")))
    if len(every) > limit:
        screen.print(output.cell(f"{len(every) - limit} older ones not shown (--limit)."))
    for line in lines:
        if line.error:
            screen.print(output.cell(f"{line.run_id}: {line.error}"))


@group.command("show")
def show(
    run: Run = "latest",
    storage: StorageUri = None,
    config: ConfigFile = None,
    env: Environment = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show one run: attempts, metrics, backends, checkpoints."""
    import time

    from ray_tracking.cli import output
    from ray_tracking.monitoring.overview import overview
    from ray_tracking.monitoring.select import select_run

    store = open_store(storage, config, env)
    now = time.time()
    view = overview(store, select_run(store, run), now)
    if as_json:
        output.print_json(view.to_json())
    else:
        _print_overview(output.console(), view, now)


@group.command("compare")
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="Two or more runs.")],
    storage: StorageUri = None,
    config: ConfigFile = None,
    env: Environment = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare runs: where their configs differ, and their metrics side by side."""
    import time

    from ray_tracking.cli import output
    from ray_tracking.errors import UsageError
    from ray_tracking.monitoring import compare as comparing
    from ray_tracking.monitoring.select import select_run

    if len(runs) < 2:
        raise UsageError("One run alone can't be compared.", hint="Name two or more: runs compare RUN RUN.")
    store = open_store(storage, config, env)
    result = comparing.compare(store, [select_run(store, run) for run in runs], time.time())
    if as_json:
        output.print_json(result.to_json())
    else:
        _print_comparison(output.console(), result)


def _print_overview(screen: Console, view: Overview, now: float) -> None:
    from ray_tracking.cli import output

    ended = view.ended if view.ended is not None else view.alive
    facts = [
        ("run", view.run_id),
        ("name", view.name),
        ("status", view.status),
        ("step", view.last_step),
        (
            "started",
            f"{output.duration(now - view.created)} ago, ran {output.duration(ended - view.created)}",
        ),
        ("entrypoint", view.entrypoint),
        ("where", view.path),
    ]
    screen.print(output.facts(facts))
    if view.attempts:
        rows = [
            (
                attempt.number,
                "unknown" if attempt.resumed_from_step is None
                else "fresh" if attempt.resumed_from_step < 0
                else f"step {attempt.resumed_from_step}",
                output.duration((attempt.ended or view.alive) - attempt.started),
                attempt.reason or "running",
            )
            for attempt in view.attempts
        ]  # fmt: skip
        screen.print()
        screen.print(output.table("Attempts", ("attempt", "from", "lasted", "ended"), rows, right=("lasted",)))
    if view.metrics:
        metrics = [
            (
                key + (" *" if key == view.monitor else ""),
                output.number(of["last"]),
                output.number(of["best"]),
            )
            for key, of in view.metrics.items()
        ]
        screen.print()
        screen.print(output.table("Metrics (* monitor)", ("metric", "last", "best"), metrics, right=("last", "best")))
    print_backends(screen, view, kinds=True)
    if view.checkpoints:
        kept = [
            (
                checkpoint.step,
                output.size(checkpoint.bytes),
                ", ".join(
                    word
                    for word, holds in (
                        ("best", checkpoint.best),
                        ("pinned", checkpoint.pinned),
                        ("incomplete", not checkpoint.complete),
                    )
                    if holds
                ),
                checkpoint.why or "",
            )
            for checkpoint in view.checkpoints
        ]
        screen.print()
        screen.print(output.table("Checkpoints", ("step", "size", "", ""), kept, right=("step", "size")))
    for problem in view.problems:
        screen.print()
        screen.print(output.cell(f"Problem: {problem}"))


def print_backends(screen: Console, view: Overview, *, kinds: bool = False) -> None:
    """How each backend stands; below the table why one is behind, and with `kinds` what it can't show."""
    from ray_tracking.cli import output
    from ray_tracking.runs.store import sweep_of
    from ray_tracking.tracking.syncing import sync_command

    if not view.backends:
        return
    rows = [
        (name, backend.state, backend.delivered, backend.pending, backend.dropped, backend.location)
        for name, backend in view.backends.items()
    ]
    columns = ("backend", "state", "delivered", "pending", "dropped", "where")
    screen.print()
    screen.print(output.table("Backends", columns, rows, right=("delivered", "pending", "dropped")))
    for name, backend in view.backends.items():
        if backend.error:
            behind = f", {backend.pending} records pending" if backend.pending else ""
            screen.print(output.cell(f"{name} is {backend.state}{behind}: {backend.error}"))
        if kinds and backend.unsupported:
            screen.print(output.cell(f"{name} can't show: {', '.join(backend.unsupported)}"))
    if view.status != "running" and any(backend.state != "complete" for backend in view.backends.values()):
        place, mark, query = view.path.partition("?")
        root = place.removesuffix(f"/{view.run_id}")
        if (sweep := sweep_of(view.run_id)) is not None:
            root = root.removesuffix(f"/{sweep}")
        storage = f"{root}{mark}{query}"
        # not through the console: a command that is broken over lines can't be copied
        typer.echo(f"Fill them: {sync_command(view.run_id, storage)}")


def _print_comparison(screen: Console, result: Comparison) -> None:
    from ray_tracking.cli import output

    # Run ids are long and tables 80 wide: columns are lettered, and the letters explained.
    letters = [_letter(index) for index in range(len(result.runs))]
    rows = zip(letters, result.runs, result.status, result.last_step, strict=True)
    screen.print(output.table("Runs", ("", "run", "status", "step"), rows, right=("step",)))
    screen.print()
    if result.config:
        config = [(key, *(_shown(value) for value in values)) for key, values in result.config.items()]
        screen.print(output.table("Config, where it differs", ("key", *letters), config))
    else:
        screen.print(output.cell("Their configs are the same."))
    if result.metrics:
        metrics = [
            (key, *("-" if value is None else _last_best(value["last"], value["best"]) for value in values))
            for key, values in result.metrics.items()
        ]
        screen.print()
        screen.print(output.table("Metrics, last (best)", ("metric", *letters), metrics))


def _last_best(last: float | None, best: float | None) -> str:
    from ray_tracking.cli import output

    return f"{output.number(last)} ({output.number(best)})"


def _shown(value: object) -> str | None:
    return None if value is None else str(value)


def _letter(index: int) -> str:
    """A, B, ... Z, AA, AB, ..."""
    return (_letter(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)
