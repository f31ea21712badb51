"""Which rank is to blame when all stand still."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ray_tracking.runs.process import Process
from ray_tracking.tracking.hangs import Heard, Report, Roll, Verdict, judge

LIMIT = 10.0
HUNG = Report(7, 11.0, computes=False, waits=False, patient=False, process=Process("host-b", 42))
WAITS = replace(HUNG, waits=True, process=Process("host-a", 41))
COMPUTES = replace(HUNG, computes=True)
RUNS = replace(HUNG, idle=1.0)
OVER = replace(HUNG, over=True)


def told(*reports: Report | Heard | None, since: float = 100.0) -> Verdict | None:
    """By rank; None: never heard of."""
    heard = {
        rank: each if isinstance(each, Heard) else Heard(each, 0.0)
        for rank, each in enumerate(reports)
        if each is not None
    }
    return judge(heard, len(reports), LIMIT, since)


@pytest.mark.parametrize(
    ("reports", "blamed", "actors"),
    [
        ((WAITS, HUNG), (1,), (1,)),
        ((HUNG, WAITS, WAITS), (0,), (0,)),
        ((replace(HUNG, idle=31.0),), (0,), (0,)),  # nobody waits for it: three times as long, too
        ((HUNG, WAITS, replace(HUNG, step=6)), (2,), (2,)),  # the one furthest behind
        ((HUNG, WAITS, HUNG), (0, 2), (0, 2)),
        ((WAITS, WAITS), (0, 1), (0, 1)),  # different collectives
        ((WAITS, Heard(RUNS, 10.5)), (1,), (0,)),  # stopped, or its host is away
        ((Heard(RUNS, 12.0), WAITS, Heard(RUNS, 12.0)), (0, 2), (1,)),
        ((WAITS, None), (1,), (0,)),  # it never came
        ((WAITS, Heard(OVER, 11.0)), (0,), (0,)),  # it waits for one that has returned
        # One that computes gets three times as long, also before its first step and at a checkpoint.
        ((WAITS, replace(COMPUTES, idle=31.0)), (1,), (1,)),
        ((WAITS, replace(HUNG, patient=True, idle=31.0)), (1,), (1,)),
        ((COMPUTES, WAITS, HUNG), (2,), (2,)),  # others wait on the GPU, busily
    ],
)
def test_a_hang_is_blamed_on(
    reports: tuple[Report | None, ...], blamed: tuple[int, ...], actors: tuple[int, ...]
) -> None:
    verdict = told(*reports)
    assert verdict is not None
    assert (verdict.ranks, verdict.actors) == (blamed, actors)
    assert verdict.is_for_others == (blamed != actors)


@pytest.mark.parametrize(
    "reports",
    [
        (WAITS, RUNS),
        (RUNS,),
        (replace(WAITS, idle=9.0), HUNG),  # not long enough for all
        (COMPUTES, COMPUTES),  # a long validation on every rank: nobody waits
        (COMPUTES,),
        (HUNG,),
        (HUNG, HUNG),
        (WAITS, COMPUTES),  # a long validation on one, still within its patience
        (WAITS, replace(HUNG, patient=True)),
        (RUNS, Heard(RUNS, 50.0)),  # only cut off from the tracker: the others get on
        (Heard(OVER, 50.0), RUNS),
        (Heard(OVER, 50.0), Heard(OVER, 50.0)),
        (HUNG, Heard(OVER, 50.0)),  # the last one at work, longer than the others, but nobody waits for it
    ],
)
def test_no_hang(reports: tuple[Report, ...]) -> None:
    assert told(*reports) is None


def test_one_that_has_not_come_yet_is_waited_for() -> None:
    assert told(WAITS, None, since=9.0) is None


def test_the_text_names_rank_process_step_and_time() -> None:
    said = [told(WAITS, HUNG), told(WAITS, Heard(replace(HUNG, idle=1.0), 10.5)), told(WAITS, None)]
    assert [verdict and verdict.text for verdict in said] == [
        "rank 1 (pid 42 on host-b) hung at step 7: no progress for 11 s",
        "rank 1 (pid 42 on host-b) hung: it answers no more, last seen at step 7; nothing heard for 10 s",
        "rank 1 hung: it never came to the training function; nothing heard for 10 s",
    ]


def test_a_roll_is_of_one_group() -> None:
    roll = Roll()
    assert roll.hear("a", 1, 2, RUNS, LIMIT, now=0.0) is None
    assert roll.hear("a", 0, 2, WAITS, LIMIT, now=9.0) is None
    verdict = roll.hear("a", 0, 2, WAITS, LIMIT, now=10.0)
    assert verdict is not None
    assert verdict.ranks == (1,)
    assert verdict.processes == {1: Process("host-b", 42)}
    assert roll.hear("b", 0, 2, WAITS, LIMIT, now=11.0) is None, "what was heard of the group before is forgotten"
    assert roll.hear("b", 0, 2, WAITS, LIMIT, now=21.0) is not None
