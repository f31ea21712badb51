from __future__ import annotations

import math
import random

import pytest

from ray_tracking.monitoring.report.importance import LEAST_TRIALS, Tried, importance
from ray_tracking.monitoring.report.params import axes, flat

SPACE = {
    "lr": {"loguniform": [1e-5, 1e-1]},
    "width": {"choice": [16, 32, 64]},
    "optimizer": {"choice": [{"kind": "adam"}, {"kind": "sgd", "momentum": {"uniform": [0, 0.9]}}]},
    "epochs": 8,
}


def _trials(count: int, *, noise: bool = False) -> list[Tried]:
    """The learning rate decides, with sgd the momentum too; or, with `noise`, nothing does."""
    rng = random.Random(0)
    found = []
    for index in range(count):
        params: dict[str, object] = {"lr": 10 ** rng.uniform(-5, -1), "width": rng.choice([16, 32, 64]), "epochs": 8}
        momentum = rng.uniform(0, 0.9)
        params["optimizer"] = {"kind": "adam"} if index % 2 else {"kind": "sgd", "momentum": momentum}
        value = (math.log10(float(str(params["lr"]))) + 3) ** 2 + (0 if index % 2 else 4 * momentum)
        found.append(Tried(flat(params), rng.random() if noise else value))
    return found


def _judged(trials: list[Tried]):
    return importance(trials, axes(SPACE, [trial.params for trial in trials]))


def test_what_decides_comes_first() -> None:
    found = _judged(_trials(40))
    everywhere = [share for share in found.shares if share.among is None]
    assert everywhere[0].param == "lr"
    assert everywhere[0].share > 0.4
    assert sum(share.share for share in everywhere) == pytest.approx(1)
    assert all(share.low <= share.share <= share.high for share in found.shares)
    assert any("could be foretold" in note for note in found.notes)


def test_a_param_that_only_some_trials_have_is_judged_among_those() -> None:
    found = _judged(_trials(40))
    (momentum,) = [share for share in found.shares if share.among is not None]
    assert (momentum.param, momentum.among) == ("optimizer.momentum", 20)
    assert momentum.share > 0.4
    assert found.shares[-1] == momentum
    assert any("judged among those" in note for note in found.notes)


def test_a_param_of_one_value_is_named_and_not_judged() -> None:
    found = _judged(_trials(12))
    assert "epochs" not in [share.param for share in found.shares]
    assert "Of one value in every trial, so not judged: epochs." in found.notes


def test_chance_is_called_chance() -> None:
    assert any("take the bars for noise" in note for note in _judged(_trials(24, noise=True)).notes)


def test_few_trials_are_not_judged() -> None:
    found = _judged(_trials(LEAST_TRIALS - 1))
    assert found.shares == ()
    assert found.notes[0] == "It takes 6 trials with a value to judge by; only 5 have one."
    assert _judged([]).notes == ("It takes 6 trials with a value to judge by; none has one.",)


def test_too_few_that_have_a_param_are_said() -> None:
    found = _judged(_trials(8))
    assert "In 4 of 8 trials alone, too few to judge: optimizer.momentum." in found.notes


def test_one_value_of_all_trials_says_that_nothing_mattered() -> None:
    same = [Tried(trial.params, 1.0) for trial in _trials(10)]
    assert _judged(same).notes[0] == "All 10 trials came to the same value: nothing mattered."


def test_one_trial_that_went_astray_is_not_all_of_it() -> None:
    trials = _trials(40)
    astray = [Tried({**trials[0].params, "width": 64}, 1e9), *trials[1:]]
    assert _judged(astray).shares[0].param == "lr"
