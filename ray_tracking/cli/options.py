"""The options that several commands share, and what they mean: the storage, the config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ray_tracking.config import Config
    from ray_tracking.runs.store import RunStore

ConfigFile = Annotated[
    Path | None, typer.Option("-c", "--config", metavar="FILE", help="A YAML file over the defaults.")
]
Environment = Annotated[
    str | None,
    typer.Option("--env", metavar="NAME", help="development, production or testing [env: RAY_TRACKING_ENV]."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One config value, such as params.lr=0.01; repeatable."),
]
StorageUri = Annotated[
    str | None,
    typer.Option("--storage", metavar="URI", help="Where runs lie, s3://bucket/runs say [env: RAY_TRACKING_STORAGE]."),
]
RunId = Annotated[str | None, typer.Option("--run-id", metavar="ID", help="The run's id; default: name and time.")]
ForceNew = Annotated[
    bool, typer.Option("--force-new", help="A new run in any case: if there is one of this id, as ID-2, ID-3 ...")
]
Address = Annotated[
    str | None,
    typer.Option("--address", metavar="ADDR", help="The Ray cluster; default: one on this machine."),
]
Debug = Annotated[bool, typer.Option("--debug", help="More in the log, and tracebacks.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run id, the beginning of one, or `latest`.")]


def load_config(file: Path | None, environment: str | None, overrides: Mapping[str, object] | None = None) -> Config:
    """The config these options ask for; `overrides` (dotted or nested) go before what files say."""
    from ray_tracking.config import get_config

    return get_config(environment, overrides=overrides, file=file)


def overrides_of(settings: list[str] | None, storage: str | None) -> dict[str, object]:
    """What `--set` and `--storage` say, by dotted key. Raises ConfigError."""
    from ray_tracking.config import parse_assignments

    return {**parse_assignments(settings or []), **({"storage": storage} if storage else {})}


def open_store(storage: str | None, file: Path | None = None, environment: str | None = None) -> RunStore:
    """The runs below `--storage`, else below the storage that the config names.
    Raises UsageError if there is none."""
    from ray_tracking.errors import UsageError
    from ray_tracking.runs.store import RunStore
    from ray_tracking.storage import Storage

    uri = storage or load_config(file, environment).storage
    opened = Storage.open(uri)
    if opened.is_local and not opened.exists():
        raise UsageError(
            f"There is no storage at {opened.root}.",
            hint="Start a run with `ray-tracking demo`, or set --storage or RAY_TRACKING_STORAGE.",
        )
    return RunStore(opened)
