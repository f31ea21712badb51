from __future__ import annotations

import pytest

from ray_tracking.config import get_config
from ray_tracking.errors import UsageError
from ray_tracking.runtime.capacity import (
    DriverPlace,
    Node,
    check_capacity,
    holders,
    label_matches,
    per_worker,
    places,
    unfit,
)


def scaling(workers: int = 1, *, gpu: bool = False, **each: float) -> object:
    chosen = {"scaling.workers": workers, "scaling.use_gpu": gpu, "scaling.resources_per_worker": each}
    return get_config(overrides=chosen).scaling


HEAD = Node("head", "10.0.0.1", {"CPU": 0.0, "memory": 1e9}, {"ray.io/node-group": "head"})
SMALL = Node("small", "10.0.0.2", {"CPU": 2.0, "driver": 1.0}, {"ray.io/node-group": "cpu"})
LARGE = Node("large", "10.0.0.3", {"CPU": 3.0, "GPU": 2.0})
NODES = [HEAD, SMALL, LARGE]


def test_rays_own_defaults_count() -> None:
    assert per_worker(scaling()) == {"CPU": 1.0}
    assert per_worker(scaling(gpu=True)) == {"GPU": 1.0}
    assert per_worker(scaling(gpu=True, CPU=2.0)) == {"CPU": 2.0, "GPU": 1.0}
    assert per_worker(scaling(gpu=True, GPU=2.0)) == {"GPU": 2.0}


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        (scaling(5), None),
        (scaling(6), "6 workers need 6 CPU, it has 5"),
        (scaling(8, gpu=True), "8 workers need 8 GPU, it has 2"),
        (scaling(1, GPU=4.0), "1 worker needs 4 GPU, it has 2"),
        # 5 CPUs in all, but a worker of 2 is never spread: one fits on each
        (scaling(2, CPU=2.0), None),
        (scaling(3, CPU=1.5), None),
        (scaling(2, CPU=2.5), "have room for 1 of 2 workers of 2.5 CPU each"),
    ],
)
def test_whether_the_workers_fit(wanted: object, reason: str | None) -> None:
    said = unfit(wanted, NODES)
    assert (said == []) if reason is None else (reason in said[0])


@pytest.mark.parametrize(
    ("driver", "workers", "reason"),
    [
        (DriverPlace(), 5, None),
        (DriverPlace(cpus=1), 4, None),
        (DriverPlace(cpus=1), 5, "have room for 4 of 5 workers of 1 CPU each beside the driver"),
        (DriverPlace(cpus=4), 1, "no node can take the driver (4 CPU)"),
        (DriverPlace(resources={"driver": 1}), 5, None),
        (DriverPlace(resources={"driver": 2}), 1, "no node can take the driver (2 driver)"),
        (DriverPlace(labels={"ray.io/node-group": "cpu"}), 5, None),
        (DriverPlace(labels={"ray.io/node-group": "!head"}), 5, None),
        (DriverPlace(cpus=3, labels={"ray.io/node-group": "cpu"}), 1, "(3 CPU, label ray.io/node-group=cpu)"),
        (DriverPlace(labels={"zone": "a"}), 1, "label zone=a"),
    ],
)
def test_the_driver_takes_its_share(driver: DriverPlace, workers: int, reason: str | None) -> None:
    said = unfit(scaling(workers), NODES, driver)
    assert (said == []) if reason is None else (reason in said[0])


def test_the_driver_may_sit_where_it_disturbs_least() -> None:
    """On the small node it leaves 1 + 3 places of one CPU, on the large one 2 + 2."""
    assert unfit(scaling(2, CPU=1.5), NODES, DriverPlace(cpus=0.5)) == []


@pytest.mark.parametrize(
    ("wanted", "found", "matches"),
    [
        ("a", "a", True), ("a", "b", False), ("a", None, False), ("!a", "b", True), ("!a", "a", False),
        ("!a", None, True), ("in(a, b)", "b", True), ("in(a,b)", "c", False), ("!in(a,b)", "c", True),
    ],
)  # fmt: skip
def test_label_selectors(wanted: str, found: str | None, matches: bool) -> None:
    assert label_matches(wanted, found) is matches


def test_which_nodes_can_get_workers() -> None:
    assert [node.node_id for node in holders(scaling(), NODES)] == ["small", "large"]
    assert [node.node_id for node in holders(scaling(gpu=True), NODES)] == ["large"]
    assert places({"CPU": 0.1}, Node("n", "h", {"CPU": 0.3})) == 3  # 0.3 / 0.1 is 2.9999...


def test_the_refusal_says_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"8 workers need 8 GPU, it has 2\.\n.*--set scaling.workers=N"):
        check_capacity(scaling(8, gpu=True), NODES)
    check_capacity(scaling(2, gpu=True), NODES)
