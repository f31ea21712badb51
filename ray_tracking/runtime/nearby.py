"""Copies of a run's checkpoints in the memory of Ray's nodes: where they are wanted, and their end on all of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_tracking.checkpoint.mapping import is_network
from ray_tracking.checkpoint.nearby import Nearby
from ray_tracking.checkpoint.nearby_folders import claim, forget
from ray_tracking.log import get_logger
from ray_tracking.storage import Storage

log = get_logger()

_FORGET_SECONDS = 10.0


def is_wanted(choice: str, directory: Storage) -> bool:
    """What `training.default.memory_copy` means for a run: a local disk's files are in memory already, as its cache."""
    return choice == "on" or (choice == "auto" and _is_far(directory))


def claim_nearby(choice: str, directory: Storage) -> Nearby | None:
    """For this process, while it lives; None if copies are not wanted, or (said) can't be."""
    if not is_wanted(choice, directory):
        return None
    try:
        claimed = claim(directory)
    except OSError as error:
        log.warning("no copies of checkpoints in this node's memory; storage has them", reason=str(error))
        return None
    return Nearby(str(claimed.path), _object_store_bytes(), claimed)


def forget_nearby(choice: str, directory: Storage) -> None:
    """The run has ended, however it did: remove what is left on all nodes that live. Does not raise."""
    forget(directory)
    if not is_wanted(choice, directory):
        return
    task: Any = ray.remote(num_cpus=0, max_retries=0)(forget)
    try:
        here = ray.get_runtime_context().get_node_id()
        started = [
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                directory
            )
            for node in ray.nodes()
            if node["Alive"] and node["NodeID"] != here
        ]
        for late in ray.wait(started, num_returns=len(started), timeout=_FORGET_SECONDS)[1] if started else ():
            ray.cancel(late, force=True)
    except (RayError, RuntimeError) as error:
        log.debug("copies in nodes' memory not removed; the next run there does", error=str(error))


def _is_far(directory: Storage) -> bool:
    if not directory.is_local:
        return True
    place = Path(directory.root)
    while not place.exists() and place != place.parent:
        place = place.parent
    return is_network(os.stat(place).st_dev)


def _object_store_bytes() -> int:
    """What Ray's object store on this node may grow to, in the same file system: if that is full, it crashes."""
    here = ray.get_runtime_context().get_node_id()
    sizes = [node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["NodeID"] == here]
    return int(sum(sizes))
