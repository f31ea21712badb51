"""Reaching a Ray cluster, or starting a private one; and whether it can hold the run and its hosts fit together."""

from __future__ import annotations

import os
import socket
from typing import Any
from urllib.parse import urlsplit

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError, RpcError

from ray_tracking.config import ScalingConfig
from ray_tracking.errors import UsageError
from ray_tracking.log import is_debug
from ray_tracking.runtime.actor import forwarded_environment
from ray_tracking.runtime.capacity import Node, check_capacity, holders
from ray_tracking.runtime.console import quieten
from ray_tracking.runtime.hosts import examine, judge
from ray_tracking.runtime.jobs.access import TOKEN_FIX, find_token
from ray_tracking.storage import Storage

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# How often Ray Train's controller looks after its workers. Its default, 2 s, is what a checkpoint report and the
# end of a run wait for; ten times a second would cost the controller a visible share of a small machine.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # it shows every print of a training function twice

_CONNECT_SECONDS = 4.0


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
    _check_answers(where)
    try:
        ray.init(**options)
    except AuthenticationError as error:
        raise _not_let_in(where, error) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _no_cluster(where, error) from error
    if where == "local":
        _keep_token_private()
    if not is_debug():
        quieten()
    return True


def _check_answers(where: str) -> None:
    """Ray tries for a minute and more where nothing answers. Raises UsageError."""
    place = urlsplit(where if "://" in where else f"//{where}")
    if place.scheme in ("http", "https"):
        raise UsageError(
            f"{where!r} is the address of a dashboard; drivers connect elsewhere.",
            hint=f"Give {place.hostname}:6379, or send the run as a job with `ray-tracking submit train`.",
        )
    try:
        if not (place.hostname and place.port):
            return
        socket.create_connection((place.hostname, place.port), _CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise _no_cluster(where, error) from error
    if place.scheme == "":
        _check_token(f"{place.hostname}:{place.port}")


def _check_token(where: str) -> None:
    """`ray.init` tries a token that is refused for 20 s, and then does not say that it was that. Raises UsageError."""
    token = find_token(os.environ)
    if token.value is None and os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        raise UsageError(f"RAY_AUTH_MODE is token, but {token.source}.", hint=TOKEN_FIX)
    try:
        GcsClient(address=where)
    except AuthenticationError as error:
        raise _not_let_in(where, error) from error
    except RpcError as error:
        raise _no_cluster(where, error) from error


def _not_let_in(where: str, error: AuthenticationError) -> UsageError:
    return UsageError(f"The Ray cluster at {where!r} does not let us in: {error.message}", hint=TOKEN_FIX)


def _no_cluster(where: str, error: Exception) -> UsageError:
    return UsageError(
        f"No Ray cluster answers at {where!r}: {str(error).strip().splitlines()[0]}",
        hint="Start one (`ray start --head`), give another --address, or leave it out for a private local cluster.",
    )


def _keep_token_private() -> None:
    """Ray writes the token of a new cluster readable for everybody."""
    token = os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token")
    if os.path.isfile(token) and os.stat(token).st_uid == os.getuid():
        os.chmod(token, 0o600)


def check(scaling: ScalingConfig, storage: Storage) -> None:
    """Raise UsageError if the cluster can't hold the workers, or if its hosts don't share storage and versions."""
    nodes = living_nodes()
    check_capacity(scaling, nodes)
    here = {node.host for node in nodes if node.node_id == ray.get_runtime_context().get_node_id()}
    others = [node for node in holders(scaling, nodes) if node.host not in here]
    if not others:
        return
    reports = examine(others, storage, forwarded_environment())
    problems = judge(reports, storage.uri)
    if problems:
        raise UsageError("\n".join(problem.message for problem in problems), hint=problems[0].hint)
    left = {report.host for report in reports if report.has_left}
    if left:
        check_capacity(scaling, [node for node in nodes if node.host not in left])


def living_nodes() -> list[Node]:
    """The nodes of the cluster we are connected to."""
    return [
        Node(node["NodeID"], node["NodeManagerAddress"], node["Resources"], node.get("Labels") or {})
        for node in ray.nodes()
        if node["Alive"]
    ]


def _worker_resources(scaling: ScalingConfig, name: str) -> float:
    return float(scaling.resources_per_worker.get(name, 1.0))
