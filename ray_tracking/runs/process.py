"""Which process is which, so that one that has died is told from one that is far away, slow or stopped."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Process:
    """`boot`, `namespace` and `started` are "" where the system doesn't tell (other than Linux).

    `host` is for people; it also tells apart machines that were cloned while running, which share their boot id.
    `namespace`: of process ids and of clocks, outside which `pid` and `started` mean nothing.
    """

    host: str
    pid: int
    boot: str = ""
    namespace: str = ""
    started: str = ""

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}"


def this_process() -> Process:
    pid = os.getpid()
    start = _start(pid)
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = " ".join(os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "time"))
    except OSError:
        boot = namespace = ""
    return Process(socket.gethostname(), pid, boot, namespace, start or "")


def is_here(process: Process, here: Process) -> bool:
    """Whether its number means the same process to `here`."""
    return (process.host, process.boot, process.namespace) == (here.host, here.boot, here.namespace)


def is_certainly_dead(process: Process, here: Process) -> bool:
    """Whether that process is known to have ended. False whenever it can't be known from where `here` runs."""
    if not (process.boot and process.namespace and process.started):
        return False
    if not is_here(process, here):
        return False
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass  # another user's; whether it is the same process, its start tells
    start = _start(process.pid)
    return start is not None and start != process.started


def _start(pid: int) -> str | None:
    """When it started, in ticks since the boot; "ended" for one that waits for its parent's notice; None: not told."""
    try:
        # After the name, which may hold anything: field 3, the state, to field 22, the start.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] in "ZX" and len(os.listdir(f"/proc/{pid}/task")) <= 1:
            return "ended"
        return fields[19]
    except (OSError, IndexError):
        return None
