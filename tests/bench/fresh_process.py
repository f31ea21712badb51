"""What only a new process can measure, the first save and restore: `python -m tests.bench.fresh_process WHAT SIDE ...`.

Prints one JSON object. A figure starts one of these for each repetition: the first of anything happens once a process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

from ray_tracking.checkpoint import CheckpointManager, CheckpointStore
from ray_tracking.checkpoint.inplace import load_into
from ray_tracking.checkpoint.reader import OpenCheckpoint
from ray_tracking.storage import Storage
from tests.bench.machine import ROOT
from tests.bench.other_savers import SAVERS, TORCH, clear, dcp_load_anew, torch_load
from tests.bench.state_workload import Memcpy, Workload, timed

OURS, UNPREPARED = "save_checkpoint", "save_checkpoint, unprepared"
RESTORE = "load_into"
DCP_LOAD, TORCH_LOAD = "dcp.load", "torch.load"
_STEPS = 3
_MOST_STEPS = 600
_COPIES = 3


def start(what: str, side: str, folder: Path, size: str) -> dict[str, Any]:
    """Run one and return what it printed."""
    command = [sys.executable, "-m", f"{__package__}.fresh_process", what, side, str(folder), size]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])} ended with status {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def first_save(side: str, folder: Path, size: str) -> dict[str, Any]:
    """Seconds that the first save holds up training, `stall`, and those of a copy of the same bytes, `memcpy`.

    Training goes on until the buffers are there, which the manager has provided in the background as it does by itself:
    `prepared` is how long after the optimizer's second step that was, `steps` how many had been done by then.
    UNPREPARED saves at once, when nothing could be provided.
    """
    workload = Workload.build(size)
    facts: dict[str, Any] = {}
    if side in (OURS, UNPREPARED):
        manager = CheckpointManager(CheckpointStore(Storage.open(folder / "ours")))
        if side == OURS:
            facts = _train_until_prepared(workload, manager)
        copy = Memcpy(workload.tensors)
        before = timed(copy)
        stall = timed(lambda: manager.save_checkpoint(step=1, **workload.objects))
        manager.close()
    else:
        for _ in range(_STEPS):
            workload.step()
        copy = Memcpy(workload.tensors)
        before = timed(copy)
        begin = time.perf_counter()
        wait = SAVERS[side](workload, folder / "other")
        stall = time.perf_counter() - begin
        wait()
        clear(folder / "other")
    copies = [before, *(timed(copy) for _ in range(_COPIES - 1))]
    return {"stall": stall, "memcpy": median(copies), **facts}


def _train_until_prepared(workload: Workload, manager: CheckpointManager) -> dict[str, Any]:
    """The first step is the one that the optimizer has made already, before there was a manager to see it."""
    workload.step()
    workload.step()
    began, steps = time.perf_counter(), 2
    preparing = manager._writer._preparing
    if preparing is None:
        raise RuntimeError("the manager has not begun to provide buffers after two steps")
    while preparing.is_alive():
        if steps >= _MOST_STEPS:
            raise RuntimeError(f"the buffers were not there after {steps} steps")
        workload.step()
        steps += 1
    return {"prepared": time.perf_counter() - began, "steps": steps}


def restore(side: str, folder: Path, size: str) -> dict[str, Any]:
    """Seconds to restore what lies in `folder` into a new model and optimizer."""
    from ray_tracking.examples.gpt_model import optimizer_for

    model = Workload.build(size, seed=1).model
    workload = Workload(model, optimizer_for(model, 1e-3))
    ways: Mapping[str, Callable[[], None]] = {
        RESTORE: lambda: restore_newest(workload, folder / "plain"),
        DCP_LOAD: lambda: dcp_load_anew(workload, folder / "dcp-by-name"),
        TORCH_LOAD: lambda: torch_load(workload, folder / TORCH),
    }
    return {"seconds": timed(ways[side])}


def restore_newest(workload: Workload, folder: Path, **options: Any) -> None:
    """As a run on Ray resumes: find the newest checkpoint, verify it, put it into the live objects."""
    store = CheckpointStore(Storage.open(folder), **options)
    with OpenCheckpoint(store.storage, store.checkpoints()[-1], store.keyring) as opened:
        load_into(workload.objects, opened)


WHAT: Mapping[str, Callable[[str, Path, str], dict[str, Any]]] = MappingProxyType(
    {"first-save": first_save, "restore": restore}
)


def main() -> None:
    what, side, folder, size = sys.argv[1:]
    print(json.dumps(WHAT[what](side, Path(folder), size)))


if __name__ == "__main__":
    main()
