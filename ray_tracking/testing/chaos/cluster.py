"""A Ray cluster of several nodes on this machine, of chaos's own, whose nodes and head can be killed.

In: what a worker needs. Out: an address; the processes of each node. Only this machine's own loopback address is used,
and Ray's token authentication, with a token of the cluster's own: other users of the machine can't submit to it.
"""

from __future__ import annotations

import itertools
import json
import math
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ray_tracking.config import ScalingConfig
from ray_tracking.errors import RunFailedError
from ray_tracking.testing.chaos.plan import Part
from ray_tracking.testing.chaos.ports import free_port
from ray_tracking.testing.chaos.processes import Launched, Process, kill_together

_HOST = "127.0.0.1"
_STARTED = "Ray runtime started."
_START_SECONDS = 300.0
_LOOK_SECONDS = 0.1
_STORE_BYTES = 200_000_000
_SPARE = 1
_RANDOM_PORTS = ("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0")
"""Ray's fixed ones are taken by the first of several nodes on a machine."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How many nodes there are beside the head, and what each offers: room for one worker of the run."""

    nodes: int
    cpus: int
    resources: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, scaling: ScalingConfig) -> Shape:
        """One node for each worker and one to spare, so that the run can go on at once without the one that died."""
        needed = dict(scaling.resources_per_worker)
        cpus = math.ceil(needed.pop("CPU", 1.0))
        return cls(scaling.workers + _SPARE, cpus, needed)


class LocalCluster:
    """A head that has no CPUs, for driver, controller and tracker, and the nodes of `shape`."""

    def __init__(self, shape: Shape, environment: Mapping[str, str], logs: Path) -> None:
        self._shape = shape
        self._logs = logs
        # Not in the scratch folder: the paths of Ray's sockets must be short.
        self._folder = Path(tempfile.mkdtemp(prefix="rtc-", dir="/tmp"))
        token = self._folder / "token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        self.environment = {**environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        """Of the nodes, and of who wants to connect."""
        self._numbers = itertools.count(1)
        self._head: Launched | None = None
        self._nodes: list[Launched] = []
        self.address = ""
        """Of the head, a new one with each start."""

    @property
    def commands(self) -> list[Launched]:
        """Of the head and all nodes that were not killed."""
        return [*([] if self._head is None else [self._head]), *self._nodes]

    def start(self) -> None:
        """The head and all nodes, if there is none; returns when they are up. Raises RunFailedError if they don't come
        up."""
        if self._head is not None:
            return
        number = next(self._numbers)
        self.address = f"{_HOST}:{free_port(_HOST)}"
        self._head = self._launch(
            f"head-{number}",
            "--head",
            f"--port={self.address.rpartition(':')[2]}",
            f"--temp-dir={self._folder / str(number)}",  # a new head on an old one's folder finds the old session
            f"--ray-client-server-port={free_port(_HOST)}",
            "--include-dashboard=false",
            "--disable-usage-stats",
            "--num-cpus=0",
        )
        end = time.monotonic() + _START_SECONDS
        while not _is_up(self._head):
            self._wait(self._head, end)
        while self.mend():
            self._wait(self._nodes[-1], end)

    def mend(self) -> bool:
        """Begin to start a node that is missing, one after the other: Ray gives each 30 s, busy machine or not.

        Returns whether some are still missing.
        """
        for node in [node for node in self._nodes if node.status is not None]:
            node.kill_all()  # what it may have left behind
            self._nodes.remove(node)
        if self._nodes and not _is_up(self._nodes[-1]):
            return True
        if len(self._nodes) == self._shape.nodes:
            return False
        resources = json.dumps(dict(self._shape.resources))
        self._nodes.append(
            self._launch(
                f"node-{next(self._numbers)}",
                f"--address={self.address}",
                f"--num-cpus={self._shape.cpus}",
                *(("--resources", resources) if self._shape.resources else ()),
            )
        )
        return True

    def find(self, part: Part) -> list[Process]:
        """The processes of a part of the run, on all nodes."""
        return [process for command in self.commands for process in command.find(part)]

    def kill_node(self, pick: float) -> list[Process]:
        """Kill one of the nodes that have a worker: all its processes at once. [] if none has one now."""
        busy = [node for node in self._nodes if node.find(Part.WORKER)]
        if not busy:
            return []
        victim = busy[int(pick * len(busy))]
        self._nodes.remove(victim)
        return victim.kill_all()

    def kill(self, *others: Launched) -> list[Process]:
        """Kill head and nodes, and other commands with them, at one moment. `start` makes a new cluster."""
        killed = kill_together([*self.commands, *others])
        self._head = None
        self._nodes = []
        return killed

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _launch(self, name: str, *options: str) -> Launched:
        words = (sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={_HOST}")
        store = f"--object-store-memory={_STORE_BYTES}"
        return Launched((*words, store, *_RANDOM_PORTS, *options), self.environment, self._logs / f"ray-{name}.log")

    def _wait(self, node: Launched, end: float) -> None:
        head_ended = self._head is not None and self._head.status is not None
        if head_ended or time.monotonic() > end:
            raise RunFailedError(
                f"The Ray cluster for the run did not start within {_START_SECONDS:.0f} s.",
                hint=f"Its head said:\n{self._head.tail() if self._head else ''}\nIts last node said:\n{node.tail()}",
            )
        time.sleep(_LOOK_SECONDS)


def _is_up(node: Launched) -> bool:
    return _STARTED in node.printed
