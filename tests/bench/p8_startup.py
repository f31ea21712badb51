"""Start-up: `import ray_tracking` and `ray-tracking --help`.

Each round starts three processes in turn: a bare interpreter, one that imports the package, and the command line.
The import's cost is its process less the bare one of the same round; the command is taken whole, as a user sees it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from tests.bench.measures import Measurement, Setup, Side, absolute, at_most, difference

_ROUNDS, _QUICK_ROUNDS = 25, 9


def measure(setup: Setup) -> list[Measurement]:
    bare = [sys.executable, "-c", "pass"]
    imported = [sys.executable, "-c", "import ray_tracking"]
    helped = [str(Path(sys.executable).with_name("ray-tracking")), "--help"]
    commands = (bare, imported, helped)
    for command in commands:  # bytecode written, files in the page cache
        _wall(command, setup.folder)
    rounds = [
        [_wall(command, setup.folder) for command in commands] for _ in range(_QUICK_ROUNDS if setup.quick else _ROUNDS)
    ]
    none, package, command_line = (tuple(column) for column in zip(*rounds, strict=True))
    return [
        difference(
            "P8", "import ray_tracking", "s", Side("import", package), Side("python -c pass", none), at_most(0.1)
        ),
        absolute("P8", "ray-tracking --help", "s", Side("--help", command_line), at_most(0.4)),
    ]


def _wall(command: list[str], folder: Path) -> float:
    begin = time.perf_counter()
    subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin
