"""Dead is only what is known to be dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from ray_tracking.runs.process import Process, is_certainly_dead, this_process

pytestmark = pytest.mark.skipif(not this_process().boot, reason="the system does not tell one process from another")


def of_child(child: subprocess.Popen[bytes]) -> Process:
    """The identity that the child itself would give."""
    here = this_process()
    line = open(f"/proc/{child.pid}/stat").read()  # noqa: SIM115
    return replace(here, pid=child.pid, started=line.rpartition(")")[2].split()[19])


@pytest.fixture
def child():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_a_process_lives_until_it_is_killed_noticed_by_its_parent_or_not(child):
    process = of_child(child)
    here = this_process()
    assert not is_certainly_dead(process, here)
    os.kill(child.pid, signal.SIGSTOP)
    assert not is_certainly_dead(process, here)
    os.kill(child.pid, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert is_certainly_dead(process, here)
    child.wait()
    assert is_certainly_dead(process, here)


def test_another_process_of_the_same_id_is_not_it():
    here = this_process()
    assert not is_certainly_dead(here, here)
    assert is_certainly_dead(replace(here, started=str(int(here.started) - 1)), here)


@pytest.mark.parametrize(
    "elsewhere",
    [
        {"host": "another"},
        {"boot": "00000000-0000-0000-0000-000000000000"},
        {"namespace": "pid:[1] time:[1]"},
        {"boot": ""},
        {"namespace": ""},
        {"started": ""},
    ],
)
def test_what_can_not_be_known_from_here_is_not_dead(elsewhere):
    here = this_process()
    gone = replace(here, started="1")
    assert is_certainly_dead(gone, here)
    assert not is_certainly_dead(replace(gone, **elsewhere), here)


def test_another_users_process_is_told_by_its_start(monkeypatch):
    def refuse(pid, number):
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    here = this_process()
    assert not is_certainly_dead(here, here)
    assert is_certainly_dead(replace(here, started="1"), here)
    assert not is_certainly_dead(replace(here, pid=2**22 + 7), here)  # nothing of it to be seen, and no proof


def test_it_names_host_and_pid():
    assert str(Process("node-3", 77)) == "pid 77 on node-3"
