"""`ray-tracking checkpoints key new|id`: making the key of encrypted checkpoints, and telling keys apart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ray_tracking.cli.options import ConfigFile, Debug, Environment, Json
from ray_tracking.cli.places import KeyEnv, KeyFile, given_section

group = typer.Typer(no_args_is_help=True, help="Keys of encrypted checkpoints: make one, tell which it is.")


@group.command("new")
def new(
    target: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="A new file, for you alone; default: standard output."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Make a random key.

    Whoever has it opens what it sealed; without it nobody does. Keep a copy where the checkpoints are not.
    """
    from ray_tracking.checkpoint.key_sources import generate_key, write_key_file
    from ray_tracking.checkpoint.keys import SECTION, key_of

    text = generate_key()
    key = key_of(text)
    if target is None:
        typer.echo(text)
        typer.echo(f"This is key {key.id}.", err=True)
        return
    write_key_file(target, text, key.id)
    typer.echo(f"Key {key.id} is in {target}, which only you can open. Keep a copy where the checkpoints are not.")
    typer.echo(f"To use it: --set {SECTION}.key_file={target.absolute()}")


@group.command("id")
def show_id(
    key_file: KeyFile = None,
    key_env: KeyEnv = None,
    key_command: Annotated[
        str | None, typer.Option("--key-command", metavar="COMMAND", help="The command that prints the key.")
    ] = None,
    config: ConfigFile = None,
    env: Environment = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the id of a key, or of all keys of a config: what `checkpoints ls` says who can open a checkpoint by.

    The one that seals comes first.
    """
    from ray_tracking.checkpoint.key_sources import SOURCES
    from ray_tracking.checkpoint.keys import SECTION, Keyring
    from ray_tracking.cli import output
    from ray_tracking.errors import UsageError

    named = dict(zip(SOURCES, (key_file and str(key_file), key_env, key_command), strict=True))
    asked = {name: value for name, value in named.items() if value is not None}
    ring = Keyring.from_config(asked or given_section(config, env).get("encryption"))
    if ring is None:
        raise UsageError(
            "No key is named.",
            hint=f"Give --key-file, --key-env or --key-command, or -c FILE with {SECTION}.",
        )
    if as_json:
        output.print_json(list(ring.ids))
        return
    for each in ring.ids:
        typer.echo(each)
