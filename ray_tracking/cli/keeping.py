"""`ray-tracking checkpoints pin|unpin|prune`: which checkpoints stay."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ray_tracking.cli.options import ConfigFile, Debug, Environment, Json, StorageUri
from ray_tracking.cli.places import Directory, Mode, Monitor, OneRun, RunAndSteps, counted, open_place, run_and_choices


def pin(
    which: RunAndSteps,
    directory: Directory = None,
    monitor: Monitor = None,
    mode: Mode = None,
    storage: StorageUri = None,
    config: ConfigFile = None,
    env: Environment = None,
    debug: Debug = False,
) -> None:
    """Keep checkpoints from ever being deleted."""
    _set_pins(which, directory, monitor, mode, storage, config, env, pinned=True)


def unpin(
    which: RunAndSteps,
    directory: Directory = None,
    monitor: Monitor = None,
    mode: Mode = None,
    storage: StorageUri = None,
    config: ConfigFile = None,
    env: Environment = None,
    debug: Debug = False,
) -> None:
    """Let pinned checkpoints go by the rules again."""
    _set_pins(which, directory, monitor, mode, storage, config, env, pinned=False)


def _set_pins(
    which: Sequence[str],
    directory: str | None,
    monitor: str | None,
    mode: str | None,
    storage: str | None,
    config: Path | None,
    env: str | None,
    *,
    pinned: bool,
) -> None:
    """All of them are found before the first is changed."""
    from ray_tracking.monitoring import checkpoints

    run, choices = run_and_choices(which, directory)
    place = open_place(run, directory, storage=storage, config=config, env=env, monitor=monitor, mode=mode)
    store = place.store
    found = store.scan()
    for info in [checkpoints.choose(place, found, choice) for choice in choices]:
        if pinned:
            store.pin(info)
        else:
            store.unpin(info)
        if pinned:
            said = "was pinned already" if info.pinned else "is pinned"
        else:
            said = "is not pinned any more" if info.pinned else "was not pinned"
        typer.echo(f"step {info.step} of {place.title} {said}")


def prune(
    run: OneRun = None,
    keep_last: Annotated[int | None, typer.Option("--keep-last", min=1, metavar="N", help="Keep the newest N.")] = None,
    keep_best: Annotated[
        int | None, typer.Option("--keep-best", min=1, metavar="K", help="Keep the best K by the monitor.")
    ] = None,
    keep_every: Annotated[
        int | None, typer.Option("--keep-every", min=1, metavar="M", help="Keep every multiple of M steps.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run/--apply", help="Only show it (the default), or delete.")] = True,
    directory: Directory = None,
    monitor: Monitor = None,
    mode: Mode = None,
    storage: StorageUri = None,
    config: ConfigFile = None,
    env: Environment = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Delete checkpoints that the rules do not keep.

    The rules are those of the run's config, or --keep-last, --keep-best and --keep-every together. The latest, the best
    and pinned ones always stay.
    """
    from ray_tracking.cli import output
    from ray_tracking.monitoring import pruning

    place = open_place(run, directory, storage=storage, config=config, env=env, monitor=monitor, mode=mode)
    strategy = pruning.rules(place, keep_last=keep_last, keep_best=keep_best, keep_every=keep_every)
    plan = pruning.prune_plan(place, place.store.scan(), strategy)
    failed = {line.info.folder: why for line, why in pruning.prune(place, plan)} if not dry_run else {}
    gone = [line for line in plan if line.delete and line.info.folder not in failed]
    freed = sum(line.info.size for line in gone)
    if as_json:
        document = {"applied": not dry_run, "bytes": freed, "checkpoints": [line.to_json() for line in plan]}
        output.print_json(document | {"problems": [f"{folder}: {why}" for folder, why in failed.items()]})
    else:
        rows = [
            (line.info.step, output.size(line.info.size), "delete" if line.delete else "keep", line.why)
            for line in plan
        ]
        screen = output.console()
        if rows:
            title = f"Checkpoints of {place.title}"
            screen.print(output.table(title, ("step", "size", "", "why"), rows, right=("step", "size")))
        done = "would be deleted; --apply deletes them" if dry_run else "deleted"
        every = counted(len(plan), "checkpoint")
        summary = f"{len(gone)} of {every} ({output.size(freed)}) {done}." if gone else f"Nothing to delete of {every}."
        screen.print(output.cell(summary))
    for folder, why in failed.items():
        typer.echo(f"{folder} was not deleted: {why}", err=True)
