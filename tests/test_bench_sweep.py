"""P6: what is made of its samples. Nothing is timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench.p6_sweep import measurements
from tests.bench.sweep_jobs import Sweep, turnarounds, untracked


def test_a_turnaround_is_from_a_trials_last_step_to_the_next_ones_first(tmp_path: Path) -> None:
    marks = [{"began": 12.5, "ended": 20.0}, {"began": 1.0, "ended": 12.0}, {"began": 20.25, "ended": 21.0}]
    (tmp_path / "marks").write_text("".join(json.dumps(mark) + "\n" for mark in marks))
    assert turnarounds(Sweep(str(tmp_path), 3, 1, 1, 1)) == [0.5, 0.25]


def test_trials_are_compared_gap_by_gap_and_sweeps_pair_by_pair() -> None:
    sweeps, cost = measurements([105.0, 99.0], [100.0, 100.0], [0.3, 0.5, 0.4], [0.25, 0.2, 0.38], [2.0, 2.4])
    assert sweeps.results == (1.05, 0.99)
    assert sweeps.is_met
    assert cost.results == pytest.approx((0.05, 0.3, 0.02))
    assert cost.result == pytest.approx(0.05)
    assert not measurements([106.0], [100.0], [0.1], [0.2], [2.0])[0].is_met
    assert "the longest 300 ms" in cost.note
    assert "itself takes 2.20 s, 44.0x as long" in cost.note


def test_both_sides_train_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray import tune

    told: list[float] = []
    monkeypatch.setattr(tune, "report", lambda metrics: told.append(metrics["val/loss"]))
    params = {**Sweep(str(tmp_path), 1, 1, 2, 3).params, "lr": 1e-3}
    untracked(params)
    assert len(told) == 2
    (mark,) = [json.loads(line) for line in (tmp_path / "marks").read_text().splitlines()]
    assert mark["began"] < mark["ended"]
