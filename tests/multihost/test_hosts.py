"""The hosts themselves, without Ray: a test on them means nothing if they are not apart."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.hosts import Host, Network
from tests.tracking.fakes import wait_until

REACH = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=2).status)"


def reaches(one: Host, other: Host) -> bool:
    done = one.run(sys.executable, "-c", REACH, f"http://{other.address}:8000")
    assert done.status == 0 or "URLError" in done.printed or "TimeoutError" in done.printed, done.printed
    return done.status == 0


def up(network: Network) -> tuple[Host, Host]:
    first, second, *_ = network.hosts
    for host in (first, second):
        if not host.is_up:
            host.boot()
    return first, second


def test_a_host_has_an_address_a_name_and_processes_of_its_own(network: Network) -> None:
    first, second = up(network)
    say = "import os, socket; name = os.uname().nodename; print(name, socket.gethostbyname(name), *os.listdir('/proc'))"
    for host in (first, second):
        name, address, *others = host.run(sys.executable, "-c", say).printed.split()
        assert (name, address) == (host.name, host.address)
        assert str(os.getpid()) not in others, "it sees the machine's processes"
    assert first.address != second.address


def test_a_host_that_is_cut_off_is_reached_again_when_it_is_healed(network: Network) -> None:
    first, second = up(network)
    serving = second.start(sys.executable, "-m", "http.server", "8000")
    wait_until(lambda: reaches(first, second), 30)
    second.cut()
    assert not reaches(first, second)
    assert serving.status is None
    second.heal()
    wait_until(lambda: reaches(first, second), 30)
    second.kill()
    assert serving.wait(60).status != 0


def test_all_that_runs_on_a_killed_host_ends_and_its_memory_is_empty_when_it_is_back(network: Network) -> None:
    host, _ = up(network)
    host.run("touch", "/dev/shm/left")
    sleeping = host.start("sh", "-c", "sleep 1000 & sleep 1000")
    wait_until(lambda: len(host.processes()) >= 3, 30)
    host.kill()
    assert sleeping.wait(60).status != 0  # its `nsenter` is none of the host's own, and ends after it
    assert host.processes() == []
    host.boot()
    assert host.run("ls", "/dev/shm").printed == ""


def test_a_hidden_folder_is_another_one_on_that_host(network: Network, shared: Path) -> None:
    one, other = up(network)
    (shared / "seen").touch()
    other.kill()
    other.hide(shared)
    other.boot()
    assert "seen" in one.run("ls", str(shared)).printed
    assert other.run("ls", str(shared)).printed == ""
    other.hidden.clear()
    other.kill()
    other.boot()
    assert "seen" in other.run("ls", str(shared)).printed
