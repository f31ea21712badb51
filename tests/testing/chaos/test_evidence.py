from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from ray_tracking.records import Kind, Record
from ray_tracking.runs.record import Attempt
from ray_tracking.testing.chaos.evidence import (
    TIMES,
    Difference,
    Evidence,
    Ignored,
    Recovery,
    compare_histories,
    compare_points,
    recoveries,
)
from ray_tracking.testing.chaos.plan import Hit, Part, Strike
from ray_tracking.testing.chaos.report import as_json, as_text, table

NOTHING = Ignored(())


def scalar(key: str, step: int, value: float, **more: object) -> Record:
    return Record(Kind.SCALAR, key, step, 1000.0 + step, value, **more)  # type: ignore[arg-type]


HISTORY = [
    *(scalar("loss", step, 1.0 / step) for step in range(1, 6)),
    scalar("nan", 3, math.nan),
    scalar("speed_per_second", 3, 7.0),
    Record(Kind.RANK_SCALAR, "own", 3, 0.0, 2.0, rank=1),
    Record(Kind.TEXT, "sample", 5, 0.0, None, b"text"),
    Record(Kind.PARAM, "lr", 0, 0.0, None, b"0.1"),
]


def test_equal_histories_whatever_their_times_attempts_and_order() -> None:
    later = [replaced(row, time=row.time + 9, attempt=3, seq=8, offset=99) for row in reversed(HISTORY)]
    difference = compare_histories(HISTORY, later, NOTHING)
    assert difference == Difference("journal", len(HISTORY), "records")
    assert difference.is_equal


def replaced(row: Record, **changes: object) -> Record:
    return row._replace(**changes)


@pytest.mark.parametrize(
    ("change", "counts", "example"),
    [
        (lambda rows: rows[1:], (1, 0, 0), "scalar 'loss' at step 1 is lost"),
        (lambda rows: [*rows, rows[0]], (0, 1, 0), "scalar 'loss' at step 1 is there too often"),
        (lambda rows: [*rows, scalar("new", 9, 0.0)], (0, 1, 0), "scalar 'new' at step 9 is there too often"),
        (
            lambda rows: [rows[0]._replace(value=math.nextafter(1.0, 2)), *rows[1:]],
            (0, 0, 1),
            "scalar 'loss' at step 1 is 1.0000000000000002 instead of 1.0",
        ),
        (lambda rows: [*rows[:-2], rows[-2]._replace(data=b"other"), rows[-1]], (0, 0, 1), "'other' instead of 'text'"),
        (lambda rows: [*rows[:-1], rows[-1]._replace(data=b"0.2")], (0, 0, 1), "param 'lr'"),
        (lambda rows: [row for row in rows if row.rank == 0], (1, 0, 0), "'own' at step 3 of rank 1 is lost"),
        (lambda rows: [*rows[:1], rows[1]._replace(step=4), *rows[2:]], (1, 1, 0), "at step 2 is lost"),
    ],
)
def test_every_difference_of_histories_is_named(change, counts, example) -> None:  # type: ignore[no-untyped-def]
    difference = compare_histories(HISTORY, change(HISTORY), NOTHING)
    assert (difference.lost, difference.doubled, difference.changed) == counts
    assert not difference.is_equal
    assert example in "; ".join(difference.examples)


def test_zero_and_minus_zero_are_not_the_same_number() -> None:
    assert compare_histories([scalar("x", 1, 0.0)], [scalar("x", 1, -0.0)], NOTHING).changed == 1


def test_what_measures_time_may_differ_but_must_be_there() -> None:
    ignored = Ignored((*TIMES, "mine/*"))
    slow = [row._replace(value=3.0) if "per_second" in row.key else row for row in HISTORY]
    assert compare_histories(HISTORY, slow, ignored).is_equal
    assert not compare_histories(HISTORY, slow, NOTHING).is_equal
    assert compare_histories(HISTORY, [row for row in slow if "second" not in row.key], ignored).lost == 1
    assert "train/tokens_per_second" in ignored
    assert "train/steps_per_sec/max" in ignored
    assert "mine/a" in ignored
    assert "train/loss" not in ignored


def test_a_param_has_no_step_of_its_own() -> None:
    again = [row._replace(step=40) if row.kind is Kind.PARAM else row for row in HISTORY]
    assert compare_histories(HISTORY, again, NOTHING).is_equal


def test_points_of_a_backend() -> None:
    logged = [("loss", step, 1.0 / step) for step in range(1, 6)] + [("nan", 1, math.nan), ("t_per_sec", 1, 5.0)]
    assert compare_points("b", logged, list(reversed(logged)), NOTHING) == Difference("b", 7, "points")
    rounded = [(key, step, float(f"{value:.8g}")) for key, step, value in logged]
    assert compare_points("b", logged, rounded, NOTHING, single=True).is_equal
    assert compare_points("b", logged, rounded, NOTHING).changed > 0
    lacking = compare_points("b", logged, logged[1:], NOTHING)
    assert (lacking.lost, lacking.doubled, lacking.changed) == (1, 0, 0)
    assert lacking.examples == ("'loss' at step 1 is lost",)
    twice = compare_points("b", logged, [*logged, logged[0]], NOTHING)
    assert (twice.lost, twice.doubled, twice.changed) == (0, 1, 0)
    other = compare_points("b", logged, [("loss", 1, 2.0), *logged[1:]], NOTHING)
    assert (other.lost, other.doubled, other.changed) == (0, 0, 1)
    assert compare_points("b", logged, [*logged[:-1], ("t_per_sec", 1, 9.0)], Ignored(TIMES)).is_equal


def hit(number: int, part: Part, time: float, attempt: int, problems: tuple[str, ...] = (), **more: object) -> Hit:
    return Hit(Strike(number, part, 1, 0.0, 0.0), time, attempt, (1,), 2, problems, **more)  # type: ignore[arg-type]


def run_with_three_kills() -> list[Recovery]:
    """Steps take 1 s; a worker dies after step 7 and restores 5; then the tracker; then the driver, restoring 10.

    The other worker logs step 8 before it learns of it.
    """
    rows = [scalar("loss", step, 0.0, attempt=1)._replace(time=step) for step in range(1, 9)]
    rows += [scalar("loss", step, 0.0, attempt=2)._replace(time=step + 14) for step in range(6, 13)]
    rows += [scalar("loss", step, 0.0, attempt=3)._replace(time=step + 30) for step in range(11, 21)]
    rows += [Record(Kind.ATTEMPT, "", 10, 33.0, attempt=3), Record(Kind.PARAM, "lr", 0, 50.0, None, b"1", attempt=3)]
    attempts = [
        Attempt(1, 0.0, 2, 8.0, "rank 1: the worker process died", -1),
        Attempt(2, 18.0, 2, 27.0, "interrupted", 5),
        Attempt(3, 33.0, 2, 55.0, "completed", 10),
    ]
    hits = [hit(1, Part.WORKER, 7.5, 1), hit(2, Part.TRACKER, 23.5, 2), hit(3, Part.DRIVER, 26.5, 2)]
    return recoveries(hits, rows, attempts)


def test_where_each_kill_hit_and_how_the_run_went_on() -> None:
    assert run_with_three_kills() == [
        Recovery(1, "worker", 7, 5, 3, 23.0 - 7.5, 2, victim="rank 1"),
        Recovery(2, "tracker", 9, None, 0, 24.0 - 23.5, 2),
        Recovery(3, "driver", 12, 10, 2, 43.0 - 26.5, 2),
    ]


def test_a_kill_after_the_last_step_does_not_count() -> None:
    rows = [scalar("loss", step, 0.0)._replace(time=step) for step in range(1, 8)]
    late, early = recoveries([hit(1, Part.TRACKER, 9.0, 1), hit(2, Part.TRACKER, 0.5, 1)], rows, [])
    assert not late.while_training
    assert not early.while_training


def evidence(**changes: object) -> Evidence:
    differences = [
        Difference("model", 3, "tensors", size=1200),
        Difference("journal", 40, "records"),
        Difference("wandb", 0, "points", skipped="its client is not installed"),
    ]
    whole = Evidence("r-killed", "r-undisturbed", 0, 3, run_with_three_kills(), differences, 20, 3, ["tokens_per_sec"])
    return replace(whole, **changes)  # type: ignore[arg-type]


def test_the_report_says_what_was_shown() -> None:
    text = as_text(evidence())
    assert "Faults: 3 of 3 while training went on (20 steps, 3 attempts, seed 0)" in text
    assert "worker (rank 1)" in text
    assert "not read back: its client is not installed" in text
    assert "Values not compared, as they measure time: tokens_per_sec" in text
    assert text.endswith(
        "Equal bit for bit: 3 tensors (1,200 bytes) and all records; none lost, none doubled; 5 steps repeated."
    )
    assert json.loads(json.dumps(as_json(evidence())))["equal"] is True


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"wanted": 4}, "only 3 of 4 faults hit while training went on"),
        ({"differences": [Difference("model", 3, "tensors", changed=1, examples=("w differs",))]}, "model: w differs"),
        ({"differences": [Difference("journal", 3, "records", lost=1)]}, "journal differs"),
        (
            {"recoveries": recoveries([hit(1, Part.DISK, 1.5, 1, outage=3.0)], [], []), "wanted": 0},
            "fault 1 (disk): the run did not feel it within 3 s",
        ),
        (
            {"recoveries": recoveries([hit(1, Part.WORKER, 1.5, 1, ("x is cut",))], [], []), "wanted": 0},
            "fault 1 (worker): a checkpoint that passed for complete does not verify: x is cut",
        ),
    ],
)
def test_what_is_no_proof_is_not_called_one(changes: dict[str, object], reason: str) -> None:
    lacking = evidence(**changes)
    assert len(lacking.shortcomings) == 1
    assert reason in as_text(lacking)
    assert "NOT SHOWN" in as_text(lacking)
    assert "Equal" not in as_text(lacking)
    assert as_json(lacking)["equal"] is False


def test_a_table_is_aligned() -> None:
    assert table(("fault", "of"), [("1", "worker"), ("10", "x")]) == ["fault  of", "    1  worker", "   10  x"]


def test_the_report_says_what_was_away_and_what_was_filled_afterwards() -> None:
    rows = [scalar("loss", step, 0.0)._replace(time=step) for step in range(1, 8)]
    away = recoveries([hit(1, Part.MLFLOW, 3.5, 1, outage=15.0, noticed="failing")], rows, [])
    shown = evidence(recoveries=away, wanted=1, synced=["mlflow"])
    assert "mlflow (away 15 s, failing)" in as_text(shown)
    assert "filled by `ray-tracking sync`: mlflow" in as_text(shown)
    assert as_json(shown)["equal"] is True
    assert as_json(shown)["synced"] == ["mlflow"]
