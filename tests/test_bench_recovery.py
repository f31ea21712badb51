"""The pure parts of P5: where ranks are killed, what is noted of it, what it comes to. Nothing is timed, no Ray."""

from __future__ import annotations

import os
import signal
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.bench import recovery_jobs
from tests.bench.p5_recovery import measurements, plan
from tests.bench.recovery_jobs import Marks, Recovery, read


class Dead(BaseException):
    pass


def test_ranks_die_in_turn_never_at_a_save_and_with_room_between() -> None:
    found = plan(Path("x"), (10, 15, 19), first_rank=1)
    assert found.kills == ((50, 1), (95, 0), (139, 1))
    assert found.steps > found.kills[-1][0]
    assert all(step % found.every for step, _ in found.kills)


def test_each_kill_happens_once_and_is_noted_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job of two ranks played by hand: groups start again from the save until the last step is done."""
    killed = []

    def kill(pid: int, number: int) -> None:
        killed.append((pid, number))
        raise Dead

    monkeypatch.setattr(recovery_jobs.os, "kill", kill)
    clock = iter(range(10_000))
    monkeypatch.setattr(recovery_jobs, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    job = plan(tmp_path, (10, 19))
    saved, groups = 0, []
    while True:
        ranks = [Marks(job, rank) for rank in (0, 1)]
        for rank in ranks:
            rank.restored(saved)
        step = saved
        try:
            while step < job.steps:
                step += 1
                for rank in ranks:
                    rank.done(step)
                saved = step if step % job.every == 0 else saved
        except Dead:
            groups.append((step, saved))
            continue
        break
    assert groups == [(50, 40), (99, 80)]
    assert killed == [(os.getpid(), signal.SIGKILL)] * 2
    found = read(job)
    assert [recovery.lost for recovery in found] == [10, 19]
    for recovery in found:
        assert 0 < recovery.began < recovery.restored < recovery.first < recovery.new
    # Two ranks look at the clock: two for their beginning, two for the restore, then rank 0 for its first step.
    assert [recovery.first for recovery in found] == [5.0, 5.0]


def test_the_untracked_job_goes_on_with_the_batch_that_comes_next() -> None:
    for rank in (0, 1):
        whole = list(islice(recovery_jobs._batches_from(0, rank, 2), 600))
        assert len(whole[0][0]) == 8
        for step in (7, 255, 256, 300):
            (x, y) = next(recovery_jobs._batches_from(step, rank, 2))
            assert torch.equal(x, whole[step][0])
            assert torch.equal(y, whole[step][1])


def test_both_train_the_same() -> None:
    one, other = recovery_jobs.net(), recovery_jobs.net()
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
    assert 6e6 < sum(parameter.numel() for parameter in one.parameters()) < 7e6


def test_the_worst_kill_decides_about_the_steps_lost() -> None:
    ours = [Recovery(1.0, 2.0, 2.5, 4.4, lost) for lost in (10, 21)]
    plain = [Recovery(1.0, 2.0, 2.5, 4.0, 10)] * 2
    speed, lost = measurements(ours, plain, 20)
    assert speed.result == pytest.approx(1.1)
    assert "restored after 2 s" in speed.note
    assert (lost.result, lost.is_met) == (21.0, False)
    assert measurements(plain, plain, 20)[1].is_met
