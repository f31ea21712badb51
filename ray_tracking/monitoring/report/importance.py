"""How much each param mattered in a sweep: functional ANOVA (Hutter, Hoos, Leyton-Brown 2014), as Optuna computes it.

In: the params and the value of each trial. Out: `Importance`: shares of the variance of the metric over the space, how
far they move when the trials are drawn again, and in words what can't be said. A forest of regression trees stands for
the metric; how well it foretells trials that it was not fitted to says whether the shares mean anything.

fANOVA and not another: correlation sees neither categories nor optima inside the range; PED-ANOVA, quicker, looks at
the best tenth alone, which of a dozen trials is one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_tracking.extras import require
from ray_tracking.monitoring.report.params import Axis
from ray_tracking.monitoring.wording import value as shown

LEAST_TRIALS = 6
_FEW_TRIALS = 40
_MOST_TRIALS = 150
_REDRAWS, _LEAST_REDRAWS, _REDRAWN_TRIALS = 12, 4, 600
"""How often trials are drawn again: fewer times where there are many, whose shares move less and take longer."""
_TREES = 32
_SEED = 0


@dataclass(frozen=True, slots=True)
class Tried:
    """A trial with a value. `params`: flat."""

    params: Mapping[str, Any]
    value: float


@dataclass(frozen=True, slots=True)
class Share:
    """Of one param. `low` and `high`: the middle 80 % of the shares when the trials are drawn again."""

    param: str
    share: float
    low: float
    high: float
    among: int | None = None
    """For a param that only some trials have: how many. Its share is that among them."""


@dataclass(frozen=True, slots=True)
class Importance:
    """`shares`, greatest first; those of params that all trials have add up to 1. `notes`: what is to be known."""

    shares: tuple[Share, ...]
    notes: tuple[str, ...]


def importance(trials: Sequence[Tried], axes: Sequence[Axis]) -> Importance:
    """Of trials whose values are finite."""
    everywhere, sometimes, constant = _sorted_out(trials, axes)
    notes = [f"Of one value in every trial, so not judged: {', '.join(constant)}."] if constant else []
    if len(trials) < LEAST_TRIALS:
        had = "none has" if not trials else f"only {len(trials)} {'has' if len(trials) == 1 else 'have'}"
        return Importance((), (f"It takes {LEAST_TRIALS} trials with a value to judge by; {had} one.", *notes))
    if len({trial.value for trial in trials}) == 1:
        return Importance((), (f"All {len(trials)} trials came to the same value: nothing mattered.", *notes))
    shares: list[Share] = []
    if everywhere:
        shares += _shares(trials, everywhere)
        notes = [*_trust(trials, everywhere), *notes]
    for group in _by_presence(trials, sometimes):
        having = [trial for trial in trials if group[0].name in trial.params]
        judged = _among(having, group, everywhere)
        if not judged:
            names = ", ".join(axis.name for axis in group)
            notes.append(f"In {len(having)} of {len(trials)} trials alone, too few to judge: {names}.")
        shares += judged
    if any(share.among for share in shares):
        notes.append("A param that only some trials have is judged among those; its share is no part of the others'.")
    return Importance(tuple(sorted(shares, key=lambda share: (share.among is not None, -share.share))), tuple(notes))


def _sorted_out(trials: Sequence[Tried], axes: Sequence[Axis]) -> tuple[list[Axis], list[Axis], list[str]]:
    """Params that all trials have, those that some have, and the names of those that never vary."""
    everywhere, sometimes, constant = [], [], []
    for axis in axes:
        values = [shown(trial.params[axis.name]) for trial in trials if axis.name in trial.params]
        if len(set(values)) < 2:
            constant += [axis.name] if values else []
        elif len(values) == len(trials):
            everywhere.append(axis)
        else:
            sometimes.append(axis)
    return everywhere, sometimes, constant


def _by_presence(trials: Sequence[Tried], axes: Sequence[Axis]) -> list[list[Axis]]:
    """Params that the same trials have together."""
    groups: dict[tuple[bool, ...], list[Axis]] = {}
    for axis in axes:
        groups.setdefault(tuple(axis.name in trial.params for trial in trials), []).append(axis)
    return list(groups.values())


def _among(having: Sequence[Tried], group: Sequence[Axis], everywhere: Sequence[Axis]) -> list[Share]:
    """The group's shares among the trials that have it, beside the params that all have."""
    if len(having) < LEAST_TRIALS or len({trial.value for trial in having}) == 1:
        return []
    varying = [axis for axis in (*group, *everywhere) if len({shown(trial.params[axis.name]) for trial in having}) > 1]
    names = {axis.name for axis in group}
    return [
        Share(found.param, found.share, found.low, found.high, len(having))
        for found in _shares(having, varying)
        if found.param in names
    ]


def _shares(trials: Sequence[Tried], axes: Sequence[Axis]) -> list[Share]:
    if len(axes) == 1:
        return [Share(axes[0].name, 1.0, 1.0, 1.0)]
    rng = np.random.default_rng(_SEED)
    chosen = list(trials)
    if len(chosen) > _MOST_TRIALS:  # the cost grows with their number, the shares hardly change
        chosen = [chosen[index] for index in sorted(rng.choice(len(chosen), _MOST_TRIALS, replace=False))]
    whole = _fanova(chosen, axes)
    redrawn = []
    for _ in range(max(_LEAST_REDRAWS, min(_REDRAWS, _REDRAWN_TRIALS // len(chosen)))):
        sample = [chosen[index] for index in rng.integers(len(chosen), size=len(chosen))]
        if len({trial.value for trial in sample}) > 1:
            redrawn.append(_fanova(sample, axes))
    found = []
    for axis in axes:
        moved = [shares[axis.name] for shares in redrawn] or [whole[axis.name]]
        low, high = (float(np.quantile(moved, at)) for at in (0.1, 0.9))
        share = whole[axis.name]
        found.append(Share(axis.name, share, min(low, share), max(high, share)))
    return found


def _fanova(trials: Sequence[Tried], axes: Sequence[Axis]) -> dict[str, float]:
    """Shares that add up to 1: each param's own effect, without interactions."""
    require("report", "optuna", "sklearn")
    import optuna
    from optuna.importance import FanovaImportanceEvaluator

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            study = optuna.create_study()
            distributions = {axis.name: _distribution(axis) for axis in axes}
            values = _robust([trial.value for trial in trials])
            study.add_trials(
                [
                    optuna.create_trial(
                        params={axis.name: _suggested(axis, trial.params[axis.name]) for axis in axes},
                        distributions=distributions,
                        value=value,
                    )
                    for trial, value in zip(trials, values, strict=True)
                ]
            )
            evaluator = FanovaImportanceEvaluator(n_trees=_TREES, seed=_SEED)
            found = evaluator.evaluate(study, params=[axis.name for axis in axes])
    finally:
        optuna.logging.set_verbosity(verbosity)
    total = sum(found.values())
    return {axis.name: found[axis.name] / total if total > 0 else 1 / len(axes) for axis in axes}


def _distribution(axis: Axis) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if axis.scale == "category":
        return CategoricalDistribution(axis.categories)
    return FloatDistribution(axis.low, axis.high, log=axis.scale == "log")


def _suggested(axis: Axis, value: Any) -> Any:
    return shown(value) if axis.scale == "category" else float(value)


def _robust(values: Sequence[float]) -> list[float]:
    """As ranks from 0 to 1, equal values alike: one trial that went astray must not be all of the variance."""
    found = np.asarray(values)
    _, inverse, counts = np.unique(found, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts + 1) / 2
    return [float(rank) for rank in middle[inverse] / max(len(values) - 1, 1)]


def _trust(trials: Sequence[Tried], axes: Sequence[Axis]) -> list[str]:
    """What the shares are worth, in words."""
    explained = _explained(trials, axes)
    if explained <= 0.05:
        worth = (
            "From these params it could not be foretold how a trial ends: take the bars for noise. Chance decided, "
            "or too few trials were run."
        )
    else:
        worth = f"Of the differences between trials, {explained:.0%} could be foretold from their params."
    if len(trials) < _FEW_TRIALS:
        worth += f" {len(trials)} trials are few: the whiskers say how far a bar moves when they are drawn again."
    return [worth]


def _explained(trials: Sequence[Tried], axes: Sequence[Axis]) -> float:
    """R² of a forest on the trials that each of its trees was not fitted to."""
    require("report", "sklearn")
    from sklearn.ensemble import RandomForestRegressor

    columns = []
    for axis in axes:
        if axis.scale == "category":
            given = [shown(trial.params[axis.name]) for trial in trials]
            columns += [[float(each == category) for each in given] for category in axis.categories]
        else:
            columns.append([axis.place(trial.params[axis.name]) for trial in trials])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        forest = RandomForestRegressor(200, min_samples_leaf=1, oob_score=True, random_state=_SEED, n_jobs=1)
        forest.fit(np.asarray(columns).T, np.asarray(_robust([trial.value for trial in trials])))
    score = float(forest.oob_score_)
    return score if math.isfinite(score) else 0.0
