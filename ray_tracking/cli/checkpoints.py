"""`ray-tracking checkpoints ls|show|verify|export`: what was saved, read from storage alone.

What stays of it is the matter of `keeping`, its keys that of `keys`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ray_tracking.cli import keys
from ray_tracking.cli.options import ConfigFile, Debug, Environment, Json, StorageUri
from ray_tracking.cli.places import (
    Directory,
    KeyEnv,
    KeyFile,
    Mode,
    Monitor,
    OneRun,
    RunAndOne,
    counted,
    keyring_for,
    one_place,
    open_place,
    run_and_choice,
    where_else,
)

if TYPE_CHECKING:
    from ray_tracking.checkpoint.store import Found
    from ray_tracking.monitoring.checkpoints import CheckpointLine, Verified
    from ray_tracking.monitoring.places import Place
    from ray_tracking.monitoring.strays import Stray

_SHOWN = 50
"""Checkpoints that a list shows people unless told otherwise."""
_REFUSED = 3

group = typer.Typer(no_args_is_help=True, help="Checkpoints: list, show, verify, pin, prune, export.")
group.add_typer(keys.group, name="key")


@group.command("ls")
def ls(
    run: OneRun = None,
    every: Annotated[bool, typer.Option("--all", help="Also what does not count, with the reason.")] = False,
    limit: Annotated[
        int | None, typer.Option("-n", "--limit", min=1, help=f"At most so many, the newest; default: {_SHOWN}.")
    ] = None,
    directory: Directory = None,
    monitor: Monitor = None,
    mode: Mode = None,
    storage: StorageUri = None,
    config: ConfigFile = None,
    env: Environment = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the complete checkpoints, oldest first."""
    import time

    from ray_tracking.cli import output
    from ray_tracking.monitoring import checkpoints
    from ray_tracking.monitoring.strays import strays

    place = open_place(run, directory, storage=storage, config=config, env=env, monitor=monitor, mode=mode)
    found = place.store.scan()
    now = time.time()
    lines = checkpoints.lines(place, checkpoints.complete(found))
    others = strays(place, found, now) if every else []
    older = checkpoints.superseded(found) if every else []
    if as_json:
        shown = lines[-limit:] if limit else lines
        entries = [line.to_json() for line in (*shown, *older)] + [stray.to_json() for stray in others]
        output.print_json(entries)
        return
    screen = output.console()
    shown = lines[-(limit or _SHOWN) :]
    if shown:
        screen.print(_table(place, shown, now))
    else:
        screen.print(output.cell(f"No complete checkpoint in {place.title}."))
        elsewhere = where_else(place, storage, config, env)
        if elsewhere:
            screen.print(output.cell(elsewhere))
    if len(shown) < len(lines):
        screen.print(output.cell(f"{len(lines) - len(shown)} older ones not shown (--limit)."))
    _print_others(place, found, older, others, every=every)


def _table(place: Place, lines: Sequence[CheckpointLine], now: float) -> Any:
    from ray_tracking.cli import output

    metric = lines[0].metric
    parts: list[tuple[str, bool, list[object]]] = [
        ("step", True, [line.step for line in lines]),
        ("epoch", True, [line.epoch for line in lines]),
        (metric or "", True, [line.value for line in lines] if metric else []),
        ("size", True, [output.size(line.bytes) for line in lines]),
        ("age", True, [output.duration(now - line.created) for line in lines]),
        ("ranks", True, [line.world_size for line in lines]),
        ("", False, [", ".join(line.marks) for line in lines]),
        ("saved", False, [line.reason for line in lines]),
        ("sealed", False, [line.sealed for line in lines]),
    ]
    # a column in which nothing stands only makes the others narrower
    parts = [part for part in parts if any(value not in ("", None) for value in part[2])]
    rows = zip(*(values for _, _, values in parts), strict=True)
    right = [name for name, aligned, _ in parts if aligned]
    return output.table(f"Checkpoints of {place.title}", [name for name, _, _ in parts], rows, right=right)


def _print_others(
    place: Place, found: Sequence[Found], older: Sequence[CheckpointLine], others: Sequence[Stray], *, every: bool
) -> None:
    from ray_tracking.cli import output

    screen = output.console()
    count = sum(item.info is None for item in found)
    if not every:
        if count:
            them = f"{counted(count, 'folder')} there {'does' if count == 1 else 'do'} not count"
            screen.print(output.cell(f"{them}: --all says why, `ray-tracking gc` collects."))
        return
    rows = [(line.folder, "older try", output.size(line.bytes), "saved again later") for line in older]
    rows += [(stray.path, stray.kind.value, output.size(stray.bytes), stray.why) for stray in others]
    if rows:
        screen.print()
        screen.print(output.table("These do not count", ("what", "kind", "size", "why"), rows, right=("size",)))


@group.command("show")
def show(
    which: RunAndOne,
    tensors: Annotated[bool, typer.Option("--tensors", help="Every tensor instead of groups of like ones.")] = False,
    directory: Directory = None,
    monitor: Monitor = None,
    mode: Mode = None,
    key_file: KeyFile = None,
    key_env: KeyEnv = None,
    storage: StorageUri = None,
    config: ConfigFile = None,
    env: Environment = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show all that a checkpoint contains: states, tensors, files.

    What is encrypted stays hidden without the key; everything else is shown.
    """
    from ray_tracking.cli import output, showing
    from ray_tracking.monitoring import checkpoints
    from ray_tracking.monitoring.inside import inside

    run, choice = run_and_choice(which, directory)
    place = open_place(run, directory, storage=storage, config=config, env=env, monitor=monitor, mode=mode)
    found = place.store.scan()
    info = checkpoints.choose(place, found, choice)
    line = next(line for line in checkpoints.lines(place, checkpoints.complete(found)) if line.folder == info.folder)
    keyring, missing = keyring_for(place, key_file=key_file, key_env=key_env, config=config, env=env)
    view = inside(place, info, line, keyring)
    if as_json:
        output.print_json(view.to_json())
        return
    showing.print_inside(output.console(), view, every=tensors)
    if missing and view.hidden:
        typer.echo(missing, err=True)


@group.command("verify")
def verify(
    which: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN WHICH", help="A step, latest, best or all (the default); of which run (default: the latest)."
        ),
    ] = None,
    directory: Directory = None,
    monitor: Monitor = None,
    mode: Mode = None,
    key_file: KeyFile = None,
    key_env: KeyEnv = None,
    storage: StorageUri = None,
    config: ConfigFile = None,
    env: Environment = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Read every byte and compare it with what was saved.

    Each problem names its file. Exit status 0 if all is good, 3 if not.
    """
    import time
    from itertools import chain

    from ray_tracking.cli import output
    from ray_tracking.cli.bar import Bar
    from ray_tracking.monitoring import checkpoints

    words = list(which or [])
    last = words[-1] if words else ""
    choice = words.pop() if checkpoints.is_choice(last, every=True) else checkpoints.ALL
    run = one_place(words, directory)
    place = open_place(run, directory, storage=storage, config=config, env=env, monitor=monitor, mode=mode)
    found = place.store.scan()
    every = choice == checkpoints.ALL
    infos = checkpoints.complete(found) if every else [checkpoints.choose(place, found, choice)]
    broken = checkpoints.broken(place, found, time.time()) if every else []
    results: list[Verified] = []
    keyring, missing = keyring_for(place, key_file=key_file, key_env=key_env, config=config, env=env)
    with Bar(f"Reading {counted(len(infos), 'checkpoint')}", sum(info.size for info in infos)) as bar:
        for result in chain(broken, checkpoints.verify(place, infos, keyring, bar.advance)):
            results.append(result)
            for line in [] if as_json else _told(result):
                bar.say(line)
    bad = sum(bool(result.problems) for result in results)
    if as_json:
        output.print_json({"good": bad == 0, "checkpoints": [result.to_json() for result in results]})
    else:
        total = output.size(sum(info.size for info in infos))
        typer.echo(f"{counted(len(results), 'checkpoint')} of {place.title}: {bad or 'none'} damaged, {total} read.")
        unopened = sum(not result.opened for result in results)
        if unopened:
            reason = missing or "no key was given (--key-file, --key-env)"
            what = f"{counted(unopened, 'encrypted checkpoint')} not opened, only digests compared"
            typer.echo(f"{what}: {reason}", err=True)
    if bad:
        raise typer.Exit(_REFUSED)


def _told(result: Verified) -> list[str]:
    from ray_tracking.cli import output

    where = result.folder if result.step is None else f"step {result.step}"
    first = f"{where}: {'damaged' if result.problems else 'good'} ({output.size(result.bytes)})"
    return [first, *(f"  {problem}" for problem in result.problems)]


@group.command("export")
def export(
    which: RunAndOne,
    target: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="A file ending in .safetensors or .pt.")
    ],
    what: Annotated[
        str, typer.Option("--what", metavar="model|all", help="The weights (the default), or all states.")
    ] = "model",
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    directory: Directory = None,
    monitor: Monitor = None,
    mode: Mode = None,
    key_file: KeyFile = None,
    key_env: KeyEnv = None,
    storage: StorageUri = None,
    config: ConfigFile = None,
    env: Environment = None,
    debug: Debug = False,
) -> None:
    """Write one file for others: safetensors or torch.

    Every byte it is made from is checked first. The file is there whole or not at all.
    """
    from ray_tracking.cli import output
    from ray_tracking.cli.bar import Bar
    from ray_tracking.extras import require
    from ray_tracking.monitoring import checkpoints

    run, choice = run_and_choice(which, directory)
    place = open_place(run, directory, storage=storage, config=config, env=env, monitor=monitor, mode=mode)
    info = checkpoints.choose(place, place.store.scan(), choice)
    keyring, missing = keyring_for(place, key_file=key_file, key_env=key_env, config=config, env=env)
    if missing and info.manifests[0].encryption is not None:
        typer.echo(missing, err=True)
    require("torch", "torch")

    from ray_tracking.checkpoint.export import check_output, export_checkpoint, size_of

    check_output(target, what, force=force)
    with Bar(f"Writing {target.name}", size_of(info, what)) as bar:
        done = export_checkpoint(
            place.storage, info, target, what=what, keyring=keyring, force=force, advance=bar.advance
        )
    typer.echo(
        f"step {info.step} of {place.title}: {done.tensors} tensors, {output.size(done.bytes)} in {target}", err=True
    )
    if done.tied:
        name, kept = next(iter(done.tied.items()))
        typer.echo(
            f"{len(done.tied)} tied names are stored once ({name} is {kept}): load it with "
            "safetensors.torch.load_model, or with load_state_dict(..., strict=False).",
            err=True,
        )
    if done.left_out:
        typer.echo(f"Left out, since they are no tensors: {', '.join(done.left_out)}", err=True)
