"""Whether the hosts of a cluster fit together: the same Ray, Python and ray-tracking, and one storage that all see.

In: the nodes that can get workers, the storage. Out: what is wrong, by host, in words. A task on each host looks; the
judgement is pure.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import NodeDiedError, RayError, TaskUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_tracking.errors import StorageError
from ray_tracking.log import get_logger
from ray_tracking.runs.versions import installed_versions
from ray_tracking.runtime.capacity import Node
from ray_tracking.storage import Storage, without_credentials

log = get_logger()

ANSWER_SECONDS = 80.0
"""A worker process starts within a second or two on a machine that has time for it; of a host that is cut off, Ray
notices within 65 s (GCS health checks: five, each 10 s and a pause of 3 s)."""
_SAID_SECONDS = 10.0
_APPEAR_SECONDS = 4.0
"""NFS may show a new file late."""
_SAME = ("ray", "ray-tracking", "torch")


@dataclass(frozen=True, slots=True)
class HostReport:
    """What one host says. `storage` is "" if it sees the probe and can write, else why not. `error`: it can't look.
    `has_left`: Ray has taken it out of the cluster meanwhile.
    """

    host: str
    versions: Mapping[str, str] = field(default_factory=dict)
    storage: str = ""
    error: str = ""
    has_left: bool = False


@dataclass(frozen=True, slots=True)
class Problem:
    """`message` names the host; `hint` says what to do."""

    message: str
    hint: str


def examine(nodes: Sequence[Node], storage: Storage, environment: Mapping[str, str]) -> list[HostReport]:
    """Ask each host, in the order of the answers. Stops at the first that sees another storage.

    `environment`: of the driver, what workers get too. Raises StorageError if the probe can't be written here.
    """
    name, content = f"probe-{secrets.token_hex(8)}", secrets.token_bytes(16)
    storage.write_bytes(name, content)
    look = ray.remote(_look(storage.uri, name, content, dict(environment)))

    def ask(node: Node) -> Any:
        affinity = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        return look.options(num_cpus=0, max_retries=0, scheduling_strategy=affinity).remote()

    try:
        return gather(by_host(nodes), ask)
    finally:
        with contextlib.suppress(StorageError):
            storage.delete(name)


def by_host(nodes: Iterable[Node]) -> dict[str, list[Node]]:
    """Each host's nodes. One that was started again a moment ago has two: Ray takes the old one for alive a while."""
    hosts: dict[str, list[Node]] = {}
    for node in nodes:
        hosts.setdefault(node.host, []).append(node)
    return hosts


def gather(hosts: Mapping[str, list[Node]], ask: Callable[[Node], Any]) -> list[HostReport]:
    """The answer of one node of each host; of the next one where that has gone. `ask` begins a task on a node."""
    reports: list[HostReport] = []
    others = {host: list(nodes) for host, nodes in hosts.items()}
    waiting = {ask(nodes.pop()): host for host, nodes in others.items()}
    begun = time.monotonic()
    said = False
    while waiting:
        left = begun + (ANSWER_SECONDS if said else _SAID_SECONDS) - time.monotonic()
        done, _ = ray.wait(list(waiting), timeout=max(left, 0.0))
        if not done and not said:
            log.info("waiting for hosts that do not answer", hosts=sorted(waiting.values()), seconds=ANSWER_SECONDS)
            said = True
        elif not done:
            late = f"no answer within {ANSWER_SECONDS:.0f} s"
            return reports + [HostReport(host, error=late) for host in waiting.values()]
        for reference in done:
            host = waiting.pop(reference)
            try:
                reports.append(HostReport(host, **ray.get(reference)))
            except (TaskUnschedulableError, NodeDiedError) as error:
                if others[host]:
                    waiting[ask(others[host].pop())] = host
                else:
                    reports.append(HostReport(host, error=_last_line(error), has_left=True))
            except RayError as error:
                reports.append(HostReport(host, error=_last_line(error)))
        if any(report.storage for report in reports):
            for reference in waiting:
                ray.cancel(reference, force=True)
            return reports
    return reports


def _last_line(error: RayError) -> str:
    return str(error).strip().splitlines()[-1].rstrip(".")


def _look(uri: str, name: str, content: bytes, environment: dict[str, str]) -> Callable[[], dict[str, Any]]:
    """The task, by value: a host that lacks this package must be able to say so."""
    seconds, packages = _APPEAR_SECONDS, _SAME

    def look() -> dict[str, Any]:
        import importlib.metadata
        import os
        import platform
        import time

        for variable, value in environment.items():
            os.environ.setdefault(variable, value)
        versions = {"python": platform.python_version()}
        for package in packages:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        try:
            from ray_tracking.errors import StorageError
            from ray_tracking.storage import Storage
        except ImportError as error:
            return {"versions": versions, "error": f"ray_tracking can't be imported there: {error}"}
        end = time.monotonic() + seconds
        while True:
            try:
                storage = Storage.open(uri)
                found = storage.read_bytes(name)
            except FileNotFoundError:
                why = "it does not see a file that the driver's host has just written there"
            except StorageError as error:
                why = error.message
            else:
                break
            if time.monotonic() > end:
                return {"versions": versions, "storage": why}
            time.sleep(0.25)
        if found != content:
            return {"versions": versions, "storage": "it reads other bytes than the driver's host has written"}
        try:
            own = f"{name}-{os.getpid()}"
            storage.write_bytes(own, content)
            storage.delete(own)
        except StorageError as error:
            return {"versions": versions, "storage": error.message}
        return {"versions": versions}

    return look


def judge(reports: Iterable[HostReport], uri: str, ours: Mapping[str, str] | None = None) -> list[Problem]:
    """What keeps the run from starting. `ours`: the versions of the driver's host (None: those installed here).

    A host that has left keeps nobody from it; whether the others suffice is another question.
    """
    here = installed_versions() if ours is None else ours
    found = []
    for report in reports:
        if report.has_left:
            log.warning("a host has just left the cluster; it goes without", host=report.host, reason=report.error)
        elif report.error:
            found.append(Problem(f"The host {report.host} can't run workers: {report.error}.", _INSTALL))
        elif report.storage:
            said = f"The host {report.host} does not share the storage {without_credentials(uri)}: {report.storage}."
            found.append(Problem(said, _SHARE))
        else:
            differ = differences(here, report.versions)
            if differ:
                said = f"The host {report.host} has other versions than the driver's host: {', '.join(differ)}."
                found.append(Problem(said, "Install the same versions on all hosts of the cluster."))
    return found


def differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """`package there (here here)` for each that workers and driver must share and do not; patch levels of Python may
    differ."""
    differ = []
    for package in ("python", *_SAME):
        here, there = ours.get(package), theirs.get(package)
        if package == "python":
            here, there = _minor(here), _minor(there)
        if here is not None and here != there:
            differ.append(f"{package} {there or 'not installed'} ({here} here)")
    return differ


def _minor(version: str | None) -> str | None:
    return None if version is None else ".".join(version.split(".")[:2])


_SHARE = "Give a path that all hosts share (NFS, mounted at the same place on each), or s3:// or gs://, with --storage."
_INSTALL = 'Install "ray-tracking[ray]" in the environment in which Ray was started there, or look at that host.'
