"""`ray-tracking gc`: what saves that were cut off left behind, and its deletion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ray_tracking.cli.options import ConfigFile, Debug, Environment, Json, StorageUri, open_store
from ray_tracking.cli.places import Directory, counted, open_place

if TYPE_CHECKING:
    from ray_tracking.monitoring.memory_copies import MemoryCopies
    from ray_tracking.monitoring.places import Place
    from ray_tracking.monitoring.strays import Stray


def gc(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN", help="A run id, the beginning of one, or `latest` (the default); a sweep with its trials."
        ),
    ] = None,
    all_runs: Annotated[
        bool, typer.Option("--all-runs", help="Every run of the storage, and the plain scripts' directory beside them.")
    ] = False,
    directory: Directory = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run/--apply", help="Only show it (the default), or delete it.")
    ] = True,
    idle: Annotated[
        bool, typer.Option("--idle", help="Nothing is writing there now: what is recent is no save under way.")
    ] = False,
    storage: StorageUri = None,
    config: ConfigFile = None,
    env: Environment = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Collect what saves that were cut off left behind.

    Half-written checkpoints, unfinished files, and copies of checkpoints in this machine's memory. Shows what there is
    and what of it would be deleted; --apply deletes it. Complete or pinned checkpoints and what a running run may be
    writing are never touched, and what ray-tracking did not write is only shown.
    """
    import time

    from ray_tracking.cli import output
    from ray_tracking.errors import UsageError
    from ray_tracking.monitoring.memory_copies import memory_copies
    from ray_tracking.monitoring.places import all_places, run_places
    from ray_tracking.monitoring.strays import RECENT, assume_idle, collect, strays

    if all_runs and (run is not None or directory is not None):
        raise UsageError("--all-runs and a single place are given.", hint="Leave one of them out.")
    if all_runs:
        places, problems = all_places(open_store(storage, config, env), time.time())
    else:
        place = open_place(run, directory, storage=storage, config=config, env=env)
        places, problems = [place], []
        if directory is None and place.run_id is not None:
            runs = open_store(storage, config, env)
            of_trials, problems = run_places(runs, runs.trials(place.run_id), time.time())
            places += of_trials
    entries: list[dict[str, Any]] = []
    screen = output.console()
    for place in places:
        judged = assume_idle(place) if idle else place
        found = strays(judged, place.store.scan(), time.time())
        doomed = [stray for stray in found if stray.kept is None]
        failed = dict(collect(place, doomed)) if not dry_run else {}
        entries += [_entry(place, stray, failed.get(stray), applied=not dry_run) for stray in found]
        if not as_json and found:
            _print(place, found, dry_run)
        problems += [f"{stray.place_in(place)}: {why}" for stray, why in failed.items()]
    freed = [entry for entry in entries if entry["delete"] and not entry.get("error")]
    copies = memory_copies(None if all_runs else [place.storage for place in places], time.time(), idle=idle)
    problems += _remove(copies) if not dry_run else []
    if as_json:
        document = {"applied": not dry_run, "bytes": sum(entry["bytes"] for entry in freed), "entries": entries}
        output.print_json(document | {"memory": [each.to_json() for each in copies], "problems": problems})
        return
    _print_copies(copies, dry_run)
    where = places[0].title if len(places) == 1 else counted(len(places), "place")
    if not all_runs and len(places) > 1:
        where = f"{places[0].title} and its {counted(len(places) - 1, 'trial')}"
    if not entries:
        summary = f"Nothing left over in {where}."
    else:
        done = "would be deleted; --apply does it" if dry_run else "deleted"
        size = output.size(sum(entry["bytes"] for entry in freed))
        parts = [f"{counted(len(freed), 'leftover')} ({size}) {done}" if freed else "Nothing to delete"]
        summary = ", ".join([*parts, f"{len(entries) - len(freed)} left alone."])
    screen.print(output.cell(summary))
    if any(kept == RECENT for kept in [*(entry["kept"] for entry in entries), *(each.kept for each in copies)]):
        screen.print(output.cell("What is recent goes too with --idle: say so only if nothing is writing there now."))
    for problem in problems:
        typer.echo(problem, err=True)


def _entry(place: Place, stray: Stray, error: str | None, *, applied: bool) -> dict[str, Any]:
    document = {"run_id": place.run_id, "directory": place.shown, **stray.to_json()}
    if applied:
        document["deleted"] = stray.kept is None and error is None
    return {**document, "error": error} if error else document


def _remove(copies: list[MemoryCopies]) -> list[str]:
    """Those that may go; what could not be removed."""
    from ray_tracking.checkpoint.nearby_folders import remove

    return [
        f"{each.leftover.path}: not removed; a run may have come to use it"
        for each in copies
        if each.kept is None and not remove(each.leftover)
    ]


def _print_copies(copies: list[MemoryCopies], dry_run: bool) -> None:
    from ray_tracking.cli import output

    if not copies:
        return
    rows = [
        (each.leftover.directory or "(unknown)", output.size(each.leftover.bytes), each.kept or _done(dry_run))
        for each in copies
    ]
    columns = ("of the run in", "size", "")
    output.console().print(output.table("In this machine's memory", columns, rows, right=("size",)))
    output.console().print()


def _done(dry_run: bool) -> str:
    return "would be deleted" if dry_run else "deleted"


def _print(place: Place, found: list[Stray], dry_run: bool) -> None:
    from ray_tracking.cli import output

    screen = output.console()
    for title, left in (("Would be deleted" if dry_run else "Deleted", False), ("Left alone", True)):
        rows = [
            (stray.path, stray.kind.value, output.size(stray.bytes), stray.kept if left else stray.why)
            for stray in found
            if (stray.kept is not None) is left
        ]
        if rows:
            columns = ("what", "kind", "size", "why")
            screen.print(output.table(f"{title} in {place.title}", columns, rows, right=("size",)))
            screen.print()
