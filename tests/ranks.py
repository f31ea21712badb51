"""Bodies of tests that several processes run together, with gloo: started once for all the bodies of a file."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_PATIENCE = timedelta(seconds=60)
"""How long a process waits for another that has failed."""


@dataclass(frozen=True)
class Ranks:
    """What a body gets: its rank, and a folder of its own that all ranks share."""

    rank: int
    size: int
    folder: Path

    def share(self, value: Any, source: int = 0) -> Any:
        """The value of one rank, on all."""
        box = [value]
        dist.broadcast_object_list(box, src=source)
        return box[0]


Body = Callable[[Ranks], None]


def run(bodies: Sequence[Body], size: int, folder: Path) -> Mapping[str, str]:
    """Run `bodies` in `size` processes: by name of the body what failed in it, "" if nothing did.

    A body that fails on some of the ranks leaves the others waiting, so that those after it are not run.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict"])
    work = [context.Process(target=_work, args=(list(bodies), rank, size, folder)) for rank in range(size)]
    for process in work:
        process.start()
    for process in work:
        process.join()
    said = [json.loads((folder / f"said-{rank}").read_text()) for rank in range(size)]
    return {body.__name__: _outcome([each.get(body.__name__) for each in said]) for body in bodies}


def _outcome(said: Sequence[list[Any] | None]) -> str:
    """What the rank says that failed first: the others fail for want of it."""
    failures = [each for each in said if each is not None and each[1]]
    if failures:
        return min(failures)[1]
    return "not run: a body before it failed" if None in said else ""


def _work(bodies: Sequence[Body], rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=_PATIENCE)
    said: dict[str, tuple[float, str]] = {}
    for body in bodies:
        place = folder / body.__name__
        place.mkdir(exist_ok=True)
        try:
            body(Ranks(rank, size, place))
            dist.barrier()
            said[body.__name__] = (0.0, "")
        except Exception:
            said[body.__name__] = (time.time(), f"rank {rank}: {traceback.format_exc()}")
            break
    (folder / f"said-{rank}").write_text(json.dumps(said))
    os._exit(0)  # destroying the group would wait for ranks that have failed
