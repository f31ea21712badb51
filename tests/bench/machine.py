"""The machine a benchmark ran on, an environment without a user's settings, and CPU time of processes (Linux)."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("ray-tracking", "ray", "torch", "numpy", "pyarrow", "tensorboard", "wandb", "mlflow")
_TICK = os.sysconf("SC_CLK_TCK")
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "DO_NOT_TRACK": "true",
    "AWS_EC2_METADATA_DISABLED": "true",
    "RAY_TRACKING_LOG_LEVEL": "warning",
}
_UNSET = ("RAY_ADDRESS", "RAY_TRACKING_ENV", "RAY_TRACKING_STORAGE", "MLFLOW_TRACKING_URI", "WANDB_SERVICE")


def isolate(home: Path) -> None:
    """No login, no settings and no telemetry of whoever runs this: for this process and those it starts."""
    for name in _UNSET:
        os.environ.pop(name, None)
    os.environ.update(_ENVIRONMENT)
    home.mkdir(parents=True, exist_ok=True)
    os.environ["HOME"] = str(home)
    # Ray's workers and our helpers import tests.bench by name.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def machine() -> dict[str, Any]:
    """Cores, versions, and how busy it is already (load average of the last 1, 5 and 15 minutes)."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def tree_cpu(pid: int) -> float:
    """CPU seconds (user and system) so far of a process, what it started, and what of that has ended."""
    parents, seconds = _processes()
    return sum(seconds[member] for member in _descendants(pid, parents) if member in seconds)


def tree(pid: int) -> set[int]:
    """A process and its descendants that live."""
    parents, _ = _processes()
    return _descendants(pid, parents) & parents.keys()


def machine_cpu() -> float:
    """CPU seconds so far of all that ran on this machine, and what its host took away (`steal`)."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + irq + softirq + steal) / _TICK


def child_named(parent: int, title: str) -> int:
    """The process id of the only child of `parent` whose command line begins with `title`."""
    parents, _ = _processes()
    found = [pid for pid, above in parents.items() if above == parent and _title(pid).startswith(title)]
    if len(found) != 1:
        raise RuntimeError(f"process {parent} has {len(found)} children called {title}")
    return found[0]


def _processes() -> tuple[dict[int, int], dict[int, float]]:
    """{pid: parent's pid} and {pid: CPU seconds}."""
    parents, seconds = {}, {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            stat = Path(entry.path, "stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        fields = stat.rpartition(")")[2].split()
        parents[int(entry.name)] = int(fields[1])
        seconds[int(entry.name)] = sum(map(int, fields[11:15])) / _TICK
    return parents, seconds


def _descendants(pid: int, parents: dict[int, int]) -> set[int]:
    members = {pid}
    while more := {child for child, parent in parents.items() if parent in members} - members:
        members |= more
    return members


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""
