"""A failed worker group in one line: the rank that failed by itself, not those that lost it."""

from __future__ import annotations

import pytest

from ray_tracking.errors import ConfigError, MetricError, RunFailedError, StorageError, UsageError
from ray_tracking.runtime.failures import is_hopeless, note_traceback, reason_of_ranks

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
        (StorageError("the server is away"), False),
        (RunFailedError("x"), False),
        (ValueError("x"), False),
    ],
)
def test_only_what_can_never_work_is_not_tried_again(error: Exception, hopeless: bool) -> None:
    assert is_hopeless(error) == hopeless


def test_a_dead_process_is_said_in_a_line() -> None:
    summary = reason_of_ranks({0: LOST, 1: DEAD}).summary
    assert summary == "rank 1: the worker process died: killed, out of memory, or crashed"


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
