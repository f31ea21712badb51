"""The processes that a command has started, seen through /proc, and no others.

In: a command line. Out: its process, the parts of a run among those that it started, and their end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ray_tracking.errors import RunFailedError, UsageError
from ray_tracking.testing.chaos.plan import Part

_PROC = Path("/proc")
_END_SECONDS = 20.0
_LOOK_SECONDS = 0.01
_ACTORS = {Part.WORKER: "ray::RayTrainWorker", Part.TRACKER: "ray::TrackerActor"}
"""How Ray titles the processes of its actors: the class, then the method that runs in it."""
_WRITER = "ray_tracking.checkpoint.writer_process"
_SERVICE = "wandb-core"


@dataclass(frozen=True, slots=True)
class Process:
    """`started` (clock ticks since the machine's start) tells it from a later process of the same id."""

    pid: int
    parent: int
    started: int
    command: str

    @property
    def is_alive(self) -> bool:
        """A zombie is not."""
        now = _read(self.pid)
        return now is not None and now.started == self.started

    def is_part(self, part: Part) -> bool:
        """Whether it is a process of this part: for W&B, of its client's service."""
        if title := _ACTORS.get(part):
            return self.command.startswith(title)
        program = self.command.partition(" ")[0].rpartition("/")[2]
        return (part is Part.WRITER and _WRITER in self.command) or (part is Part.WANDB and program == _SERVICE)

    def send(self, number: int) -> None:
        if self.is_alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def check_system() -> None:
    """Raise UsageError where processes can't be looked at."""
    if not (_PROC / "self" / "stat").exists():
        raise UsageError(f"Chaos finds processes through {_PROC}, which {sys.platform} lacks.", hint="Run it on Linux.")


def snapshot() -> dict[int, Process]:
    """All living processes of the machine."""
    found = (_read(int(entry.name)) for entry in _PROC.iterdir() if entry.name.isdigit())
    return {process.pid: process for process in found if process is not None}


def descendants(roots: Iterable[int], processes: Mapping[int, Process]) -> list[Process]:
    """Those that `roots` have started, and those that these have started, parents first. Pure."""
    children: dict[int, list[Process]] = {}
    for process in processes.values():
        children.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    waiting = list(roots)
    for pid in waiting:
        below = sorted(children.get(pid, []), key=lambda process: process.pid)
        found += below
        waiting += [process.pid for process in below]
    return found


def await_end(processes: Iterable[Process], seconds: float = _END_SECONDS) -> None:
    """Wait until all are gone. Raises RunFailedError if one can't be killed."""
    end = time.monotonic() + seconds
    left = list(processes)
    while left := [process for process in left if process.is_alive]:
        if time.monotonic() > end:
            raise RunFailedError(f"The process {left[0].pid} is still there {seconds:.0f} s after SIGKILL.")
        time.sleep(_LOOK_SECONDS)


def _read(pid: int) -> Process | None:
    """None if there is no such process, or if it has ended and only waits for its parent to notice."""
    try:
        # pid (name, which may hold anything) state parent ... started, the 22nd
        fields = (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
        command = (_PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (OSError, IndexError):
        return None
    return None if fields[0] in ("Z", "X") else Process(pid, int(fields[1]), int(fields[19]), command)


class Launched:
    """A started command with all that it starts. `output` is the file that takes what it prints.

    Its processes are remembered once they were seen: one that has lost its parent is still one of them.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], output: Path) -> None:
        self._output = output
        self._seen: dict[tuple[int, int], Process] = {}
        with output.open("ab") as stream:
            self._popen = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                process_group=0,  # Ctrl-C is for this program, which then ends the command
            )
        self.pid = self._popen.pid

    @property
    def status(self) -> int | None:
        """Its exit status, None while it runs."""
        return self._popen.poll()

    def processes(self) -> list[Process]:
        """All that it has started, and itself, as far as they live."""
        every = snapshot()
        known = [process.pid for process in self._seen.values() if process.is_alive]
        found = descendants(dict.fromkeys([self.pid, *known]), every)
        if self.pid in every and self.status is None:
            found.append(every[self.pid])
        self._seen.update({(process.pid, process.started): process for process in found})
        return [process for process in self._seen.values() if process.is_alive]

    def find(self, part: Part) -> list[Process]:
        """The processes of a part, by id; [] while there is none."""
        return sorted((one for one in self.processes() if one.is_part(part)), key=lambda process: process.pid)

    def kill_all(self) -> list[Process]:
        """SIGKILL for everything at once; returns what was killed, when it is gone."""
        return kill_together([self])

    def reap(self) -> None:
        """Take note of its end, which must be near."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(_END_SECONDS)

    @property
    def printed(self) -> str:
        """All that it printed so far."""
        return self._output.read_text(errors="replace")

    def tail(self, lines: int = 15) -> str:
        """The end of what it printed."""
        return "\n".join(self.printed.rstrip().splitlines()[-lines:]) or "(it printed nothing)"


def kill_together(commands: Iterable[Launched]) -> list[Process]:
    """SIGKILL for several commands with all that they have started, at one moment: all processes are stopped first, so
    that none can start another or put things in order.

    Returns what was killed, when it is gone.
    """
    chosen = list(commands)
    stopped: dict[int, Process] = {}
    while new := [one for command in chosen for one in command.processes() if one.pid not in stopped]:
        for process in new:
            process.send(signal.SIGSTOP)
            stopped[process.pid] = process
    for process in stopped.values():
        process.send(signal.SIGKILL)
    for command in chosen:
        command.reap()
    await_end(stopped.values())
    return list(stopped.values())
