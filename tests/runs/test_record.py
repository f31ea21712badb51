"""run.json: round trips, attempts, damage."""

from __future__ import annotations

import json

import pytest

from ray_tracking.errors import RayTrackingError
from ray_tracking.runs.record import RunRecord, Status


def record() -> RunRecord:
    return RunRecord("r1", "run", 10.0, config={"lr": 0.1}, tags={"a": "b"})


def test_round_trip() -> None:
    made = record().begin_attempt(11.0, 2).resumed(1, -1).finish(12.0, Status.FAILED, "it broke")
    assert RunRecord.from_json(made.to_json(), "run.json") == made


def test_attempts() -> None:
    first = record().begin_attempt(11.0, 2)
    second = first.begin_attempt(20.0, 3)
    ended = second.resumed(2, 7).end_attempt(30.0, "a worker died").finish(31.0, Status.FAILED, "gave up")
    assert [(a.number, a.ended, a.reason, a.world_size, a.resumed_from_step) for a in ended.attempts] == [
        (1, 20.0, "interrupted", 2, None),
        (2, 30.0, "a worker died", 3, 7),
    ]
    assert (ended.status, ended.ended) == (Status.FAILED, 31.0)
    again = ended.begin_attempt(40.0, 1)
    assert (again.status, again.ended, again.attempts[-1].number) == (Status.RUNNING, None, 3)


def test_which_statuses_are_final() -> None:
    assert {status.value for status in Status if status.is_final} == {"completed", "failed", "aborted"}


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"schema": 1}',
        b'{"schema": "x"}',
        b'{"schema": 1, "status": "glowing", "attempts": []}',
        b'{"schema": 1, "status": "running", "attempts": [3]}',
        b'{"schema": 1, "status": "running", "attempts": [{}], "run_id": "r", "name": "n", "created": 1}',
        b"\xff\xfe",
    ],
)
def test_damage_names_the_file(damage: bytes) -> None:
    with pytest.raises(RayTrackingError, match=r"/runs/r1/run\.json is damaged"):
        RunRecord.from_json(damage, "/runs/r1/run.json")


def test_a_newer_schema_is_refused_and_newer_fields_are_passed_over() -> None:
    document = json.loads(record().begin_attempt(11.0, 2).to_json())
    document["lease"] = "x"
    document["attempts"][0]["hosts"] = ["a"]
    assert RunRecord.from_json(json.dumps(document).encode(), "x").run_id == "r1"
    document["schema"] = 99
    with pytest.raises(RayTrackingError, match="newer version"):
        RunRecord.from_json(json.dumps(document).encode(), "x")
