"""`ray-tracking ui`: TensorBoard and MLflow on a storage, as children that end with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from ray_tracking.cli.options import ConfigFile, Environment, StorageUri, load_config

if TYPE_CHECKING:
    from pathlib import Path

    from ray_tracking.cli.servers import Server
    from ray_tracking.config import Config

_HOST = "127.0.0.1"
_PORTS = {"tensorboard": 6006, "mlflow": 5000}


@dataclass(frozen=True)
class Plan:
    """What to start, and what to say about that which is not started."""

    servers: tuple[Server, ...]
    notes: tuple[str, ...]


def ui(
    storage: StorageUri = None,
    config: ConfigFile = None,
    env: Environment = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show what the servers print, and tracebacks.")] = False,
) -> None:
    """Start TensorBoard and MLflow on the storage; Ctrl-C ends both."""
    from ray_tracking.cli import servers
    from ray_tracking.errors import UsageError

    resolved = load_config(config, env, {"storage": storage} if storage else None)
    plan = plan_for(resolved, _local_root(resolved.storage))
    for note in plan.notes:
        typer.echo(note)
    if not plan.servers:
        raise UsageError("There is nothing to start.", hint="Make a first run with `ray-tracking demo`.")
    servers.serve(plan.servers, typer.echo, show_output=debug)


def _local_root(uri: str) -> Path:
    """The storage as a directory. Raises UsageError for a remote one, and for one that is not there."""
    from pathlib import Path

    from ray_tracking.errors import UsageError
    from ray_tracking.storage import Storage

    if "://" in uri and not uri.startswith("file://"):  # seen without asking the remote server
        raise UsageError(
            f"The storage {uri} is remote: TensorBoard and MLflow read local files.",
            hint="Set experiment_tracking.mlflow.tracking_uri to a server and open that; "
            "for TensorBoard copy the event files here and run `tensorboard --logdir FOLDER`.",
        )
    opened = Storage.open(uri)
    if not opened.exists():
        raise UsageError(
            f"There is no storage at {opened.root}.",
            hint="Start a run with `ray-tracking demo`, or give --storage.",
        )
    return Path(opened.root)


def plan_for(config: Config, root: Path) -> Plan:
    """Which servers the storage's contents call for, and why another is not started."""
    import os
    from importlib.util import find_spec

    from ray_tracking.cli import servers

    planned: list[Server] = []
    notes: list[str] = []
    logdir = config.experiment_tracking.tensorboard.log_dir or str(root / "tensorboard")
    if find_spec("tensorboard") is None:
        notes.append('TensorBoard is not installed: pip install "ray-tracking[tensorboard]"')
    elif "://" in logdir or os.path.isdir(logdir):
        planned.append(servers.tensorboard(logdir, _HOST, servers.free_port(_PORTS["tensorboard"])))
    else:
        notes.append(f"TensorBoard: nothing to show, there is no {logdir}")
    tracking_uri = config.experiment_tracking.mlflow.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    database = root / "mlflow.db"
    if tracking_uri and tracking_uri.startswith(("http://", "https://")):
        from ray_tracking.config import redact_text

        notes.append(f"MLflow       {redact_text(tracking_uri)} (the tracking server of the config)")
    elif tracking_uri is None and not database.is_file():
        notes.append(f"MLflow: nothing to show, there is no {database}")
    elif find_spec("mlflow") is None:
        notes.append('MLflow is not installed: pip install "ray-tracking[mlflow]"')
    else:
        uri = tracking_uri or f"sqlite:///{database}"
        port = servers.free_port(_PORTS["mlflow"])
        planned.append(servers.mlflow(uri, root / "mlflow-artifacts", _HOST, port))
    return Plan(tuple(planned), tuple(notes))
