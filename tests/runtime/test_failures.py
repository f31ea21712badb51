"""A failed worker group in one line: the rank that failed by itself, not those that lost it."""

from __future__ import annotations

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train import PreemptionInfo
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.worker_group.worker import ActorMetadata
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError

from ray_tracking.errors import ConfigError, LeaseLostError, MetricError, RunFailedError, StorageError, UsageError
from ray_tracking.runtime.failures import hopeless_of, is_hopeless, note_traceback, reason_of, reason_of_ranks
from ray_tracking.runtime.hangs import RankHungError

DEAD = RuntimeError("The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR ...")
LOST = RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")


def test_the_rank_that_failed_by_itself_is_named() -> None:
    assert reason_of_ranks({0: LOST, 1: ValueError("bad batch")}).summary == "rank 1: ValueError: bad batch"
    assert reason_of_ranks({1: ValueError("b"), 0: ValueError("a")}).summary == "rank 0: ValueError: a"
    assert reason_of_ranks({0: LOST}).summary.startswith("rank 0: RuntimeError: [gloo")


@pytest.mark.parametrize(
    ("error", "hopeless"),
    [
        (UsageError("x"), True),
        (ConfigError("x"), True),
        (MetricError("x"), True),
        (LeaseLostError("another process writes it"), True),
        (StorageError("the server is away"), False),
        (RunFailedError("x"), False),
        (ValueError("x"), False),
    ],
)
def test_only_what_can_never_work_is_not_tried_again(error: Exception, hopeless: bool) -> None:
    assert is_hopeless(error) == hopeless


def test_what_a_rank_was_refused_is_found_among_the_failures() -> None:
    refused = ConfigError("params.width: ...")
    assert hopeless_of(WorkerGroupError("", {0: LOST, 1: refused})) is refused
    assert hopeless_of(WorkerGroupError("", {0: LOST, 1: ValueError()})) is None
    assert hopeless_of(ControllerError(refused)) is None


def polled(cause: Exception, ip: str = "10.0.0.7") -> WorkerHealthCheckFailedError:
    """As Ray Train wraps what its look at a worker raised."""
    worker = ActorMetadata(hostname="host-b", node_id="f00d", node_ip=ip, pid=4242, accelerator_ids={})
    return WorkerHealthCheckFailedError(f"A worker health check failed.\nWorker info: {worker}", failure=cause)


def died(message: str) -> ActorDiedError:
    context = ActorDiedErrorContext(
        error_message=message, pid=4242, node_ip_address="10.0.0.7", class_name="RayTrainWorker", actor_id=b"a" * 16
    )
    return ActorDiedError(context)


# Texts of Ray 2.60, from its own binaries.
KILLED = died(
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was "
    "killed by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed "
    "unexpectedly due to SIGSEGV or another unexpected error."
)
NODE_GONE = died("The actor died because its node has died. Node Id: f00d\n\tthe actor's node was terminated: x")
MEMORY = (
    "1 worker(s) were killed due to the node running low on memory. Refer to the documentation on how to address the "
    "out of memory issue: https://docs.ray.io/...\nMemory on the node (IP: 10.0.0.7, ID: f00d) was 7.61GB used / "
    "8.00GB limit (0.951250)\nOOM kill reason: ...\nTop 10 memory users: ..."
)


@pytest.mark.parametrize(
    ("failure", "kernel", "said"),
    [
        (polled(KILLED), None, "rank 1: the worker process on 10.0.0.7 died: killed, out of memory, or crashed"),
        (polled(KILLED), "10.0.0.8", "rank 1: the worker process on 10.0.0.7 died: killed, out of memory, or crashed"),
        (polled(KILLED), "10.0.0.7", "rank 1: out of memory: the kernel of 10.0.0.7 killed the worker; use smaller"),
        (polled(NODE_GONE), None, "rank 1: its node 10.0.0.7 died or was taken away"),
        (
            polled(OutOfMemoryError(MEMORY)),
            None,
            "rank 1: out of memory: Ray ended the worker before the node ran out of it (7.61 of 8.00 GB used on "
            "10.0.0.7); use smaller batches",
        ),
        (polled(died(MEMORY)), None, "rank 1: out of memory: Ray ended the worker before the node ran out of it (7.61"),
        (DEAD, None, "rank 1: the worker process died: killed, out of memory, or crashed"),
        (RankHungError("rank 1 (pid 3 on b) hung at step 7"), None, "rank 1 (pid 3 on b) hung at step 7"),
    ],
)
def test_a_death_is_said_in_a_line(failure: Exception, kernel: str | None, said: str) -> None:
    summary = reason_of_ranks({0: LOST, 1: failure}, kernel_killed_on=kernel).summary
    assert summary.startswith(said)
    assert "\n" not in summary


def test_who_was_found_hanging_comes_before_who_was_ended_for_it() -> None:
    assert reason_of_ranks({0: polled(KILLED), 1: RankHungError("rank 2 hung")}).summary == "rank 2 hung"


def test_a_preemption_and_workers_that_never_started() -> None:
    info = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"f00dcafe1234": [1, 2]})
    assert reason_of(PreemptionError(info)).summary == "preempted: node f00dcafe with rank 1, 2 is taken away"
    summary = reason_of(ControllerError(WorkerGroupStartupTimeoutError(4))).summary
    assert summary.startswith("the workers could not be started: The worker group startup timed out after 60")


def test_secrets_are_removed() -> None:
    assert "hunter2" not in reason_of_ranks({0: ValueError("password=hunter2hunter2")}).summary


def test_the_traceback_is_that_of_the_training_function() -> None:
    def train() -> None:
        raise KeyError("lr")

    try:
        train()
    except KeyError as error:
        note_traceback(error)
        reason = reason_of_ranks({0: error})
    assert "in train" in reason.traceback
    assert "test_the_traceback" not in reason.traceback
    assert reason.summary == "rank 0: KeyError: 'lr'"
