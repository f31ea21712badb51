"""What `submit` makes of its options and of this folder, before anything is sent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ray_tracking.runs.store import RunStore
    from ray_tracking.runtime.capacity import DriverPlace
    from ray_tracking.runtime.jobs.package import Package
    from ray_tracking.runtime.jobs.submitting import View


def driver_place(cpus: float, resources: Sequence[str], labels: Sequence[str]) -> DriverPlace:
    from ray_tracking.errors import UsageError
    from ray_tracking.runtime.capacity import DriverPlace

    amounts: dict[str, float] = {}
    for text in resources:
        name, _, amount = text.partition("=")
        try:
            amounts[name.strip()] = float(amount)
        except ValueError:
            amounts[""] = 0.0
        if not name.strip() or not amounts.get(name.strip(), 0.0) > 0 or "" in amounts:
            raise UsageError(
                f"--driver-resource {text!r} is not of the form NAME=AMOUNT with an amount above 0.",
                hint="--driver-resource head_small=1, say; CPUs have their own option: --driver-cpus 1.",
            )
    chosen: dict[str, str] = {}
    for text in labels:
        key, equals, value = text.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise UsageError(
                f"--driver-label {text!r} is not of the form KEY=VALUE.",
                hint="--driver-label ray.io/node-group=cpu, say; nodes get labels by `ray start --labels KEY=VALUE`.",
            )
        chosen[key.strip()] = value.strip()
    if "CPU" in amounts:
        cpus += amounts.pop("CPU")
    return DriverPlace(cpus, amounts, chosen)


def sent_target(target: str, source: Path | None) -> str:
    """A file by its path below this folder, as it is found on the cluster."""
    from ray_tracking.errors import UsageError
    from ray_tracking.runtime.target import split_target

    _, function, by_path = split_target(target)
    if not by_path or source is None:
        return target
    here = Path.cwd().resolve()
    if not source.is_relative_to(here):
        raise UsageError(
            f"{source} is not below {here}, which is the folder that is sent.",
            hint="Run submit in the folder that holds your code, or name an installed module: package.module:function.",
        )
    return f"{source.relative_to(here).as_posix()}:{function}"


def check_sent(source: Path | None, package: Package) -> None:
    from ray_tracking.errors import UsageError

    if source is not None and source.is_relative_to(Path.cwd().resolve()) and not package.holds(source):
        raise UsageError(
            f"{source} would not be sent: a .gitignore, .rayignore or --exclude leaves it out.",
            hint="Take the line out of it, or name another target.",
        )


def reachable_store(storage: str) -> RunStore | None:
    """The runs, if this machine sees the storage; the cluster's hosts must, this one need not."""
    from ray_tracking.errors import StorageError
    from ray_tracking.runs.store import RunStore
    from ray_tracking.storage import Storage

    try:
        return RunStore(Storage.open(storage))
    except StorageError as error:
        if not storage.startswith("s3://"):
            raise
        typer.echo(f"Note: this machine can't use the storage, the cluster may: {error.message}", err=True)
        return None


def refuse_completed(store: RunStore | None, run: str) -> None:
    from ray_tracking.errors import RefusedError
    from ray_tracking.runs.record import Status

    if store is not None and store.exists(run) and store.load(run).status is Status.COMPLETED:
        raise RefusedError(
            f"The run {run!r} is completed.", hint="Choose another --run-id, or leave it out for a new one."
        )


def view_of(store: RunStore | None, run: str) -> View:
    from ray_tracking.cli.supervising import newest_step
    from ray_tracking.errors import RayTrackingError
    from ray_tracking.runs import stopping
    from ray_tracking.runtime.jobs.submitting import View

    def status() -> str | None:
        try:
            return store.load(run).status.value if store is not None and store.exists(run) else None
        except RayTrackingError:
            return None

    def step() -> int | None:
        newest = -1 if store is None else newest_step(store, run)
        return newest if newest >= 0 else None

    def is_stopped() -> bool:
        try:
            return store is not None and stopping.requested(store.directory(run)) is not None
        except RayTrackingError:
            return False

    return View(status, step, is_stopped)
