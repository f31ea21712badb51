"""What the checkpoint commands share: which directory is meant, and the keys that open what lies there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ray_tracking.cli.options import load_config, open_store
from ray_tracking.errors import UsageError

if TYPE_CHECKING:
    from ray_tracking.checkpoint.keys import Keyring
    from ray_tracking.monitoring.places import Place

OneRun = Annotated[
    str | None, typer.Argument(metavar="RUN", help="A run id, the beginning of one, or `latest` (the default).")
]
RunAndOne = Annotated[
    list[str],
    typer.Argument(metavar="[RUN] WHICH", help="A step, latest or best; of which run (default: the latest run)."),
]
RunAndSteps = Annotated[
    list[str],
    typer.Argument(metavar="[RUN] WHICH", help="Steps, latest, best; of which run (default: the latest run)."),
]
Directory = Annotated[
    str | None,
    typer.Option("--dir", metavar="PATH", help="A directory or URI with a plain script's checkpoints, not a run's."),
]
Monitor = Annotated[
    str | None, typer.Option("--monitor", metavar="KEY", help="The metric that tells the best; default: the run's.")
]
Mode = Annotated[
    str | None, typer.Option("--mode", metavar="min|max", help="Whether its best is the lowest or the highest.")
]
KeyFile = Annotated[
    Path | None, typer.Option("--key-file", metavar="FILE", help="The key of encrypted ones; default: the config's.")
]
KeyEnv = Annotated[
    str | None, typer.Option("--key-env", metavar="NAME", help="The environment variable that holds the key.")
]


def counted(number: int, what: str) -> str:
    """`1 checkpoint`, `3 checkpoints`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def run_and_choices(words: Sequence[str], directory: str | None) -> tuple[str | None, list[str]]:
    """(run, which checkpoints). The first word is a run if it can't say which checkpoint, or is `latest` with more to
    come."""
    from ray_tracking.monitoring.checkpoints import LATEST, is_choice

    first, *rest = words
    if directory is None and (not is_choice(first) or (first == LATEST and rest)):
        if not rest:
            raise UsageError(f"Which checkpoint of {first} is not said.", hint="Add a step, latest or best.")
        return first, rest
    return None, list(words)


def run_and_choice(words: Sequence[str], directory: str | None) -> tuple[str | None, str]:
    """A run and one checkpoint of it."""
    run, choices = run_and_choices(words, directory)
    if len(choices) > 1:
        raise UsageError(f"One checkpoint is meant, not {len(choices)}: {' '.join(choices)}.")
    return run, choices[0]


def one_place(words: Sequence[str], directory: str | None) -> str | None:
    """The run among at most one word."""
    if len(words) > 1 or (words and directory is not None):
        raise UsageError(f"One place is meant, not also {words[-1]!r}.", hint="Give a run or --dir, then which one.")
    return words[0] if words else None


def open_place(
    run: str | None,
    directory: str | None,
    *,
    storage: str | None,
    config: Path | None,
    env: str | None,
    monitor: str | None = None,
    mode: str | None = None,
) -> Place:
    """The run's directory (the latest run's if none is named), or `--dir`. Raises UsageError."""
    import time

    from ray_tracking.monitoring.places import directory_place, run_place
    from ray_tracking.monitoring.select import LATEST, select_run

    if mode not in (None, "min", "max"):
        raise UsageError(f"--mode: found {mode!r}; allowed: min, max.")
    now = time.time()
    if directory is None:
        runs = open_store(storage, config, env)
        place = run_place(runs, select_run(runs, run or LATEST), now)
    elif run is not None:
        raise UsageError(f"Both a run ({run}) and --dir are given.", hint="Leave one of them out.")
    else:
        section = given_section(config, env)
        place = directory_place(
            directory, section, now, monitor=section.get("monitor"), mode=str(section.get("mode") or "min")
        )
    return replace(place, monitor=monitor or place.monitor, mode=mode or place.mode)


def given_section(config: Path | None, env: str | None) -> Mapping[str, Any]:
    """`training.default` of a config that was asked for; empty if none was, since defaults say nothing about a
    directory."""
    if config is None and env is None:
        return {}
    return load_config(config, env).training.default.to_dict()


def where_else(place: Place, storage: str | None, config: Path | None, env: str | None) -> str | None:
    """Where the checkpoints may be that somebody looks for in a run that has none."""
    from ray_tracking.checkpoint.store import CheckpointStore
    from ray_tracking.monitoring.places import SCRIPTS

    if place.run_id is None:
        return None
    root = open_store(storage, config, env).storage
    if not root.exists(SCRIPTS) or not CheckpointStore(root.child(SCRIPTS)).scan():
        return None
    return f"Plain scripts keep theirs apart from runs: --dir {root.child(SCRIPTS).uri}"


def keyring_for(
    place: Place, *, key_file: Path | None, key_env: str | None, config: Path | None, env: str | None
) -> tuple[Keyring | None, str | None]:
    """The keys that may open the checkpoints there; and, if those the run names can't be read, why.

    From the options, else from a config that was given, else from what the run recorded. Raises ConfigError for a key
    that was asked for and is none.
    """
    from ray_tracking.checkpoint.keys import Keyring
    from ray_tracking.errors import ConfigError

    if key_file is not None and key_env is not None:
        raise UsageError("Both --key-file and --key-env are given.", hint="Leave one of them out.")
    if key_file is not None or key_env is not None:
        return Keyring.from_config({"key_file": None if key_file is None else str(key_file), "key_env": key_env}), None
    given = given_section(config, env).get("encryption")
    if given is not None:
        return Keyring.from_config(given), None
    recorded = _without_commands(place.section.get("encryption"))
    try:
        return Keyring.from_config(recorded), None
    except ConfigError as error:
        return None, error.message


def _without_commands(section: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The sources of keys that a run recorded, but no command: who may write run.json must not run programs here."""
    if section is None:
        return None
    kept: dict[str, Any] = {key: section.get(key) for key in ("key_file", "key_env")}
    for name in ("recipients", "old_keys"):
        kept[name] = [source for source in map(_without_commands, _sources(section.get(name))) if source]
    return kept if any(kept.values()) else None


def _sources(value: object) -> Sequence[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list | tuple) else []
