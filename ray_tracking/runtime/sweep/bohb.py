"""BOHB: HyperBand whose new trials are proposed by a model of what the trials before reached at its rungs.

In: values at HyperBand's milestones. Out: params. The model is that of the largest milestone with enough values, since
these tell most of a whole training. (Falkner, Klein, Hutter: BOHB, ICML 2018, algorithm 2; the densities are those of
Optuna's multivariate TPE.) A proposal depends on the seed, its number and the values alone: after a restart they are
told again, and the next one is what it would have been.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ray.tune.search import Searcher

from ray_tracking.config.sweep_space import Group
from ray_tracking.errors import ConfigError
from ray_tracking.runtime.sweep.space import ask, named

BUDGET = "hyperband_info"
"""In a result: {budget: reports of the milestone} of one that has come to it, else {}. Ray's TuneBOHB reads it too."""
_CANDIDATES = 64
_GOOD = 0.15


class BohbSearcher(Searcher):
    """`options`: `random_fraction` (of proposals that are drawn, 1/3), `min_points` (values that a model needs, by
    default one more than the space has params, and two), and what Optuna's TPESampler takes.
    """

    def __init__(
        self,
        tree: Group,
        points: Sequence[Mapping[str, Any]],
        seed: int,
        metric: str,
        mode: str,
        options: Mapping[str, Any],
    ) -> None:
        import optuna

        super().__init__(metric=metric, mode=mode)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        self._tree = tree
        self._points = deque(dict(named(tree, point)) for point in points)
        self._seed = seed
        self._direction = "minimize" if mode == "min" else "maximize"
        left = dict(options)
        self._random_fraction = _number(left, "random_fraction", 1 / 3, least=0.0, most=1.0)
        self._min_points = int(_number(left, "min_points", 0, least=2, most=1e9))
        self._options = left
        self._sampler(0)  # says now what it does not take
        self._asked: dict[str, Any] = {}
        self._number = 0
        self._reached: dict[int, dict[str, float]] = {}
        """By milestone and trial."""

    def suggest(self, trial_id: str) -> dict[str, Any]:
        self._number += 1
        seed = (self._seed + self._number) % 2**32
        random = np.random.RandomState(seed).uniform() < self._random_fraction
        known = [] if random or self._points else self._observed()
        samplers = self._optuna.samplers
        sampler = self._sampler(seed) if known else samplers.RandomSampler(seed=seed)
        study = self._optuna.create_study(direction=self._direction, sampler=sampler)
        study.add_trials(known)
        if self._points:
            study.enqueue_trial(self._points.popleft())
        trial = study.ask()
        params: dict[str, Any] = ask(self._tree, trial)
        self._asked[trial_id] = trial
        return params

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        budget, value = result.get(BUDGET, {}).get("budget"), result.get(self.metric)
        if budget is not None and value is not None and np.isfinite(value):
            self._reached.setdefault(int(budget), {})[trial_id] = float(value)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """What it reached is known; one that failed tells nothing."""

    def _observed(self) -> list[Any]:
        """Optuna's trials of the largest milestone that has enough; [] if none has."""
        for budget in sorted(self._reached, reverse=True):
            values = self._reached[budget]
            most = max(len(self._asked[name].params) for name in values)
            if len(values) >= (self._min_points or most + 3):
                return [
                    self._optuna.trial.create_trial(
                        params=self._asked[name].params, distributions=self._asked[name].distributions, value=value
                    )
                    for name, value in values.items()
                ]
        return []

    def _sampler(self, seed: int) -> Any:
        defaults: dict[str, Any] = {
            "multivariate": True,
            "group": True,
            "n_startup_trials": 0,
            "n_ei_candidates": _CANDIDATES,
            "gamma": lambda known: max(2, int(np.ceil(_GOOD * known))),
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            try:
                return self._optuna.samplers.TPESampler(seed=seed, **(defaults | self._options))
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"sweep.searcher.options: {error}.",
                    hint="Allowed: random_fraction, min_points, and the keyword arguments of Optuna's TPESampler.",
                ) from error


def _number(options: dict[str, Any], key: str, default: float, *, least: float, most: float) -> float:
    found = options.pop(key, None)
    if found is None:
        return default
    if isinstance(found, bool) or not isinstance(found, int | float) or not least <= found <= most:
        raise ConfigError(f"sweep.searcher.options.{key}: {found!r}.", hint=f"Allowed: {least:g} to {most:g}.")
    return found
