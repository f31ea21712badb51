"""Runs `faulty.train` on a cluster of its own: `python -m tests.runtime.private_cluster drained|memory FOLDER`.

A process has one cluster only, and the tests share theirs.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any


def drained(folder: Path) -> None:
    """Two nodes with room for both workers; the one they are on is drained with a deadline, as before a preemption."""
    import ray
    from ray._raylet import GcsClient
    from ray.cluster_utils import Cluster
    from ray.core.generated import autoscaler_pb2

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, logging_level="ERROR")

    def drain() -> None:
        wait_for_checkpoint(folder)
        free = ray._private.state.available_resources_per_node()
        busy = [node for node, each in free.items() if ray_cpus(node) and not each.get("CPU")]
        deadline = int((time.time() + 25) * 1000)
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, why = GcsClient(address=cluster.address).drain_node(busy[0], reason, "taken away", deadline)
        assert accepted, why

    def ray_cpus(node: str) -> float:
        return next(each["Resources"].get("CPU", 0.0) for each in ray.nodes() if each["NodeID"] == node)

    threading.Thread(target=drain, daemon=True).start()
    fit(folder, [], pause=2.5)
    ray.shutdown()
    cluster.shutdown()


def memory(folder: Path) -> None:
    """Ray's memory monitor ends a worker that takes a few percent of the machine more than is in use now."""
    import ray

    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    sizes = {words[0]: int(words[1]) for words in lines}
    threshold = min(1 - sizes["MemAvailable:"] / sizes["MemTotal:"] + 0.2, 0.97)
    os.environ.update(
        {
            "RAY_memory_usage_threshold": f"{threshold:.3f}",
            "RAY_memory_monitor_refresh_ms": "100",
            # One worker at a time: by default it may take the controller with it, which is the driver's to survive.
            "RAY_worker_killing_policy_by_group": "true",
        }
    )
    ray.init(address="local", num_cpus=3, include_dashboard=False, logging_level="ERROR")
    fit(folder, [["memory", 1, 1, 6]], pause=0.1)


def wait_for_checkpoint(folder: Path) -> None:
    while not list((folder / "r").glob("attempt-001/step-*/rank-00001-of-00002.json")):
        time.sleep(0.1)


def fit(folder: Path, faults: list[Any], pause: float) -> None:
    from tests.runtime import faulty
    from tests.runtime.test_recovery import manager

    # Whoever else uses the machine may keep its memory scarce for a while after the kill.
    rules = {"failure.max_failures": 5 if faults else 0, "training.default.save_total_limit": None}
    result = manager(folder, faults, {"pause": pause}, **rules).fit(faulty.train)
    assert result.status == "completed"
    assert result.attempts >= 2


if __name__ == "__main__":
    {"drained": drained, "memory": memory}[sys.argv[1]](Path(sys.argv[2]))
