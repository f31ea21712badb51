"""When the workers are started again: the policy that stands in for Ray Train's own. Without a cluster."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError
from ray.train import PreemptionInfo
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, TrainingFailedError, WorkerGroupError

from ray_tracking.config import get_config
from ray_tracking.errors import UsageError
from ray_tracking.runtime import restarts
from ray_tracking.runtime.restarts import RestartPolicy, given_up, kernel_kills

FAILED = WorkerGroupError("", {1: ValueError("a bug")})
PREEMPTED = PreemptionError(PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"f00d": [0]}))
NO_ROOM = ControllerError(WorkerGroupStartupTimeoutError(2))


class Actor:
    """Notes what the tracker is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []
        self.call = self

    def remote(self, method: str, text: str) -> None:
        self.told.append((method, text))


def policy(monkeypatch: pytest.MonkeyPatch, steps: list[int], **failure: Any) -> tuple[RestartPolicy, Actor]:
    """`steps`: of the newest checkpoint at each failure."""
    config = get_config("testing", {"failure": {"max_failures": 2, **failure}, "scaling.workers": 2})
    made = RestartPolicy(config, "r", "/nowhere", {}, actor := Actor())
    left = iter(steps)
    monkeypatch.setattr(made, "_newest_step", lambda: next(left))
    return made, actor


def again(made: RestartPolicy, *errors: TrainingFailedError) -> list[bool]:
    return [made.make_decision(error) is FailureDecision.RETRY for error in errors]


@pytest.mark.parametrize(
    ("most", "steps", "decisions"),
    [
        (2, [-1, -1, -1], [True, True, False]),
        (2, [8, 8, 8], [True, True, False]),
        (2, [8, 8, 16, 16, 16], [True, True, True, True, False]),  # with progress the count begins again
        (2, [8, 16, 24, 32, 40], [True] * 5),
        (1, [8, 8], [True, False]),
        (0, [], [False]),
        (-1, [], [True] * 9),
    ],
)
def test_failures_in_a_row_without_a_new_checkpoint_end_the_run(
    monkeypatch: pytest.MonkeyPatch, most: int, steps: list[int], decisions: list[bool]
) -> None:
    made, actor = policy(monkeypatch, steps, max_failures=most)
    assert again(made, *[FAILED] * len(decisions)) == decisions
    assert [text for method, text in actor.told if method == "end_attempt"] == ["rank 1: ValueError: a bug"] * len(
        decisions
    )
    why = [text for method, text in actor.told if method == "give_up"]
    assert len(why) == (0 if decisions[-1] or most == 0 else 1)


def test_preemptions_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    made, actor = policy(monkeypatch, [8, 8, 8])
    assert again(made, PREEMPTED, FAILED, *[PREEMPTED] * 5, FAILED, PREEMPTED, FAILED) == [*[True] * 9, False]
    assert actor.told[0] == ("end_attempt", "preempted: node f00d with rank 0 is taken away")


def test_what_was_refused_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made, actor = policy(monkeypatch, [], max_failures=9)
    assert again(made, WorkerGroupError("", {0: UsageError("params.width: found 'wide'")})) == [False]
    assert [method for method, _ in actor.told] == ["end_attempt"]


def test_workers_that_find_no_room_are_waited_for_aloud_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(restarts.time, "monotonic", lambda: now)
    monkeypatch.setattr(restarts.ray, "available_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(restarts.ray, "cluster_resources", lambda: {"CPU": 4.0})
    made, actor = policy(monkeypatch, [8, 8, 8, 8], start_timeout_secs=150)
    assert again(made, NO_ROOM) == [True]
    now += 60
    assert again(made, NO_ROOM) == [True]
    assert actor.told[-1] == (
        "warn",
        "the workers have not started for 120 s: 2 workers need 1 CPU each; free: 1 of 4 CPU",
    )
    assert again(made, FAILED) == [True], "they had started: the wait is over"
    now += 60
    assert again(made, NO_ROOM, NO_ROOM) == [True, True]
    now += 100
    assert again(made, NO_ROOM) == [False]
    assert actor.told[-1][0] == "give_up"
    assert "start_timeout_secs: 150" in actor.told[-1][1]


def test_workers_that_die_while_they_start_are_counted_and_given_time(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(restarts.time, "sleep", waited.append)
    made, actor = policy(monkeypatch, [-1, -1, -1])
    died = ControllerError(WorkerGroupStartupFailedError("At least one of the worker actors failed to initialize."))
    memory = ControllerError(OutOfMemoryError("5 worker(s) were killed due to the node running low on memory. See ..."))
    assert again(made, died, memory, died) == [True, True, False]
    assert waited == [2.0, 4.0]
    assert actor.told[1][1].startswith("the workers could not be started: out of memory: Ray ended the worker")
    assert actor.told[0] == (
        "warn",
        "the workers could not be started: At least one of the worker actors failed to initialize.",
    )


def test_other_faults_of_the_controller_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = policy(monkeypatch, [])
    assert again(made, ControllerError(RuntimeError("x"))) == [False]


def test_a_storage_that_is_away_counts_as_no_progress(tmp_path: Any) -> None:
    (tmp_path / "file").write_text("")
    config = get_config("testing", {"failure": {"max_failures": 1}})
    made = RestartPolicy(config, "r", str(tmp_path / "file" / "x"), {}, actor := Actor())
    assert again(made, FAILED, FAILED) == [True, False]
    assert any("can't be seen" in text for _, text in actor.told)


def test_why() -> None:
    assert given_up(4, 120, 3) == (
        "it failed 4 times in a row without a new checkpoint since that of step 120; failure.max_failures: 3"
    )
    assert "there is none yet" in given_up(4, -1, 3)


def test_the_kernel_counts_what_it_killed() -> None:
    assert kernel_kills() >= 0
