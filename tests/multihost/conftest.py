"""Three hosts for the tests of this folder, a disk that they share, and a cluster that is whole for each test."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import hosts
from tests.hosts import Host, Network
from tests.multihost.runs import Reference, SharedRuns

COUNT = 3
_NOTICED_SECONDS = 120.0


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    if why := hosts.why_not():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("hosts")
    with hosts.shared_storage(folder / "shared"), hosts.network(COUNT, folder) as made:
        yield made


@pytest.fixture(scope="session")
def shared(network: Network) -> Path:
    """The folder that all hosts see."""
    return network.folder / "shared"


@pytest.fixture(scope="session")
def runs(shared: Path) -> SharedRuns:
    return SharedRuns(str(shared))


@pytest.fixture(scope="session")
def reference(network: Network, runs: SharedRuns) -> Reference:
    """The run that nothing happened to, trained on this machine alone, when it is first asked for."""
    return Reference(network, runs)


class Cluster:
    """Ray on the hosts, in token mode: the first is the head and has no CPUs, each other one offers one."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.head, *self.workers = network.hosts
        self._joined: dict[Host, tuple[int, int]] = {}
        """At which of its boots a host has joined, and with how many CPUs."""

    def ensure(self) -> None:
        """Every host up, on the network, sees the shared disk, and is a node of one cluster."""
        for host in self.network.hosts:
            host.heal()
            if host.hidden:
                host.hidden.clear()
                host.kill()
        if not self._is_node(self.head, 0):
            self.restart()
        for host in self.workers:
            self.bring(host)
        self.await_nodes()

    def await_nodes(self) -> None:
        """Ray takes a host that died for alive for some seconds, beside what came back: no test begins with that."""
        request = urllib.request.Request(f"{self.head.jobs_address}/api/v0/nodes")
        request.add_header("Authorization", f"Bearer {self.network.token.read_text()}")
        end = time.monotonic() + _NOTICED_SECONDS
        while True:
            try:
                with urllib.request.urlopen(request, timeout=10) as answer:
                    rows = json.load(answer)["data"]["result"]["result"]
            except (OSError, KeyError, TypeError):  # the dashboard is not so far, or had no answer itself
                rows = []
            alive = [row["node_ip"] for row in rows if row["state"] == "ALIVE"]
            if sorted(alive) == sorted(host.address for host in self.network.hosts):
                return
            assert time.monotonic() < end, f"Ray counts {alive}"
            time.sleep(0.5)

    def restart(self) -> None:
        """A new cluster: nothing of one before it is left."""
        self.network.kill_all()
        self.head.boot()
        self.head.start_head()
        self._joined = {self.head: (self.head.boots, 0)}
        for host in self.workers:
            self.bring(host)

    def bring(self, host: Host, *, cpus: int = 1) -> None:
        """Boot the host if it is down, and let it join, if it is no node with so many CPUs yet."""
        if self._is_node(host, cpus):
            return
        host.kill()
        host.boot()
        host.join(self.head, cpus=cpus)
        self._joined[host] = (host.boots, cpus)

    def _is_node(self, host: Host, cpus: int) -> bool:
        return host.is_up and self._joined.get(host) == (host.boots, cpus)


@pytest.fixture(scope="session")
def _cluster(network: Network) -> Cluster:
    return Cluster(network)


@pytest.fixture
def cluster(_cluster: Cluster) -> Cluster:
    _cluster.ensure()
    return _cluster
