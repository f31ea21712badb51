from __future__ import annotations

from typing import Any

import pytest

from ray_tracking.errors import RefusedError, UsageError
from ray_tracking.runs.record import Attempt, RunRecord, Status
from ray_tracking.runs.resuming import changes, check_resumable, hidden_keys, is_superseded, overrides_of


def record(**fields: Any) -> RunRecord:
    return RunRecord(**{"run_id": "r", "name": "n", "created": 1.0, "entrypoint": "m:f", **fields})


def test_what_can_be_resumed() -> None:
    for status in (Status.RUNNING, Status.FAILED, Status.ABORTED):
        check_resumable(record(status=status), has_function=False)
    with pytest.raises(RefusedError, match="completed"):
        check_resumable(record(status=Status.COMPLETED), has_function=True)
    with pytest.raises(UsageError, match="--target"):
        check_resumable(record(entrypoint=None), has_function=False)
    check_resumable(record(entrypoint=None), has_function=True)


def test_the_recorded_configuration_on_the_storage_it_lies_on_now() -> None:
    recorded = record(config={"params": {"lr": 0.1}, "storage": "/old/place"})
    assert overrides_of(recorded, "s3://bucket/runs", {}) == {"params": {"lr": 0.1}, "storage": "s3://bucket/runs"}


@pytest.mark.parametrize("given", ["params.api_key", "params", "tokens.1"])
def test_secret_values_are_asked_for_by_name(given: str) -> None:
    config = {"params": {"api_key": "[removed]", "lr": 1}, "tokens": ["a", "user:[removed]@host"]}
    assert list(hidden_keys(config)) == ["params.api_key", "tokens.1"]
    with pytest.raises(UsageError) as caught:
        overrides_of(record(config=config), "s", {given: "x"})
    assert ("params.api_key=..." in str(caught.value)) == (given == "tokens.1")
    assert ("tokens.1=..." in str(caught.value)) == (given != "tokens.1")
    overrides_of(record(config=config), "s", {"params.api_key": "x", "tokens": []})


def test_changes_in_words() -> None:
    before = record(
        code_digest="sha256:1", versions={"torch": "2.0", "gone": "1"}, attempts=(Attempt(1, 0.0, world_size=2),)
    )
    assert changes(before, code_digest="sha256:1", versions={"torch": "2.0", "gone": "1"}, workers=2) == []
    found = changes(before, code_digest="sha256:2", versions={"torch": "2.1"}, workers=4)
    assert len(found) == 4
    assert "training function has changed" in found[0]
    assert "torch 2.0 is now 2.1" in found
    assert "gone 1 is now not installed" in found
    assert "2 workers are now 4" in found[-1]


@pytest.mark.parametrize(
    ("attempt", "step", "superseded"),
    [
        (1, 4, False),
        (1, 8, False),  # what the second went on from
        (1, 9, True),
        (2, 9, False),
        (2, 20, False),  # the third has not said yet; the fourth went on from it
        (2, 21, True),
        (3, 20, False),
        (3, 21, True),
        (4, 99, False),
    ],
)
def test_what_lies_past_what_a_later_attempt_went_on_from(attempt: int, step: int, superseded: bool) -> None:
    resumed = (-1, 8, None, 20)
    attempts = [Attempt(n, 0.0, 1, resumed_from_step=one) for n, one in enumerate(resumed, 1)]
    assert is_superseded(attempt, step, attempts) is superseded
    assert not is_superseded(attempt, step, attempts[:attempt])
