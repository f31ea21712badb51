"""Reaching a Ray cluster, or starting a private one; and whether it can hold the run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import ray

from ray_tracking.config import ScalingConfig
from ray_tracking.errors import UsageError
from ray_tracking.log import is_debug
from ray_tracking.runtime.console import quieten
from ray_tracking.storage import Storage

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# How often Ray Train's controller looks after its workers. Its default, 2 s, is what a checkpoint report and the
# end of a run wait for; ten times a second would cost the controller a visible share of a small machine.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # it shows every print of a training function twice


def connect(address: str | None, scaling: ScalingConfig) -> bool:
    """Use the running connection, or connect to `address` (or RAY_ADDRESS), or start a private cluster here.

    Returns whether the connection was made here, and so is to be shut down by the caller.
    Raises UsageError if there is no cluster at the address.
    """
    if ray.is_initialized():
        return False
    where = address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"address": where, "logging_level": "ERROR", "log_to_driver": True}
    if where == "local":
        needed = sum(_worker_resources(scaling, "CPU") for _ in range(scaling.workers))
        options["num_cpus"] = max(os.cpu_count() or 1, int(needed + 0.999))
        options["include_dashboard"] = False
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"No Ray cluster answers at {where!r}: {str(error).strip().splitlines()[0]}",
            hint="Start one (`ray start --head`), give another --address, or leave it out for a private local cluster.",
        ) from error
    if where == "local":
        _keep_token_private()
    if not is_debug():
        quieten()
    return True


def _keep_token_private() -> None:
    """Ray writes the token of a new cluster readable for everybody."""
    token = os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token")
    if os.path.isfile(token) and os.stat(token).st_uid == os.getuid():
        os.chmod(token, 0o600)


def check(scaling: ScalingConfig, storage: Storage) -> None:
    """Raise UsageError if the cluster can't hold the workers, or if they could not share the storage."""
    total = ray.cluster_resources()
    missing = lacking(scaling, total)
    if missing:
        raise UsageError(
            "The cluster can't hold the run: " + "; ".join(missing) + ".",
            hint="Use fewer workers (--set scaling.workers=N), smaller scaling.resources_per_worker or more nodes.",
        )
    nodes = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if storage.is_local and len(nodes) > 1 and not os.path.ismount(_mount_of(storage.root)):
        raise UsageError(
            f"The storage {storage.uri} is a local folder, but the cluster has {len(nodes)} hosts.",
            hint="Give a path that all hosts share (NFS), or s3:// or gs://, with --storage.",
        )


def lacking(scaling: ScalingConfig, total: Mapping[str, float]) -> list[str]:
    """What the workers need and the cluster has not, in words."""
    each = dict(scaling.resources_per_worker) or ({} if scaling.use_gpu else {"CPU": 1.0})  # Ray's own defaults
    needed = {name: amount * scaling.workers for name, amount in each.items()}
    if scaling.use_gpu:
        needed["GPU"] = max(needed.get("GPU", 0), float(scaling.workers))
    return [
        f"{scaling.workers} workers need {amount:g} {name}, it has {total.get(name, 0):g}"
        for name, amount in needed.items()
        if amount > total.get(name, 0)
    ]


def _worker_resources(scaling: ScalingConfig, name: str) -> float:
    return float(scaling.resources_per_worker.get(name, 1.0))


def _mount_of(path: str) -> str:
    """The mount point that holds `path`, "" if it is the root file system's (which no two hosts share)."""
    while not os.path.ismount(path):
        path = os.path.dirname(path)
    return "" if path == "/" else path
