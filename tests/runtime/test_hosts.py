from __future__ import annotations

from typing import Any

import pytest

from ray_tracking.runtime.capacity import Node
from ray_tracking.runtime.hosts import HostReport, by_host, differences, gather, judge

OURS = {"python": "3.11.2", "ray": "2.60.0", "ray-tracking": "0.1.0", "torch": "2.13.0"}


def test_hosts_that_agree_are_no_problem() -> None:
    assert judge([HostReport("h1", OURS), HostReport("h2", {**OURS, "python": "3.11.9"})], "/runs", OURS) == []


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (HostReport("h2", OURS, storage="it does not see a file"), ["h2", "/runs", "does not see a file"]),
        (HostReport("h2", {**OURS, "torch": "2.12.0"}), ["h2", "torch 2.12.0 (2.13.0 here)"]),
        (HostReport("h2", {**OURS, "python": "3.12.1"}), ["h2", "python 3.12 (3.11 here)"]),
        (
            HostReport("h2", {"python": "3.11.2", "ray": "2.60.0"}),
            ["ray-tracking not", "torch not installed"],
        ),
        (HostReport("h2", error="no answer within 80 s"), ["h2", "no answer"]),
    ],
)
def test_the_host_is_named_with_what_is_wrong(report: HostReport, said: list[str]) -> None:
    (problem,) = judge([HostReport("h1", OURS), report], "/runs", OURS)
    for part in said:
        assert part in problem.message
    assert "h1" not in problem.message
    assert problem.hint


def test_credentials_of_the_storage_are_not_shown() -> None:
    (problem,) = judge([HostReport("h", OURS, storage="no")], "s3://key:secret@bucket/runs", OURS)
    assert "secret" not in problem.message


def test_what_the_driver_itself_lacks_is_not_asked_of_others() -> None:
    assert differences({"python": "3.11.2"}, OURS) == []


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_of_a_host_that_was_started_again_the_node_that_lives_is_asked() -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    gone = "ab" * (len(here) // 2)
    nodes = [Node(here, "h1", {}), Node(gone, "h1", {}), Node(gone, "h2", {})]

    @ray.remote
    def look() -> dict[str, Any]:
        return {"versions": OURS}

    def ask(node: Node) -> Any:
        affinity = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        return look.options(num_cpus=0, max_retries=0, scheduling_strategy=affinity).remote()

    reports = {report.host: report for report in gather(by_host(nodes), ask)}
    assert reports["h1"] == HostReport("h1", OURS)
    assert reports["h2"].has_left
    assert judge(reports.values(), "/runs", OURS) == [], "the others may suffice"
