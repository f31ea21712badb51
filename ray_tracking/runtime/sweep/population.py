"""Schedulers that train a population: now and then a bad trial takes over the state of a good one, and goes on with
params near that one's (PBT) or proposed by a model of what has paid so far (PB2).

Ray Tune decides who and when; which params and what is recorded is ours. Runs in the driver.
"""

from __future__ import annotations

import importlib
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler
from ray.tune.schedulers.pbt import _PBTTrialState

from ray_tracking.config.sweep import SchedulerConfig
from ray_tracking.config.sweep_population import mutable
from ray_tracking.config.sweep_space import SHAPES, Distribution, Group
from ray_tracking.runtime.sweep.book import Exploit
from ray_tracking.runtime.sweep.mutation import into, mutated, read, written
from ray_tracking.runtime.sweep.reporting import IS_LAST, REPORTS, STATE_STEP

Exploited = Callable[[Exploit], Mapping[str, Any]]
"""Puts it on record; returns the trial's new config."""


class Population(PopulationBasedTraining):
    """PBT. The same seed gives the same draws, though who is how far when a draw is made depends on time."""

    def __init__(
        self, config: SchedulerConfig, tree: Group, metric: str, mode: str, seed: int, exploited: Exploited
    ) -> None:
        super().__init__(
            time_attr=REPORTS,
            metric=metric,
            mode=mode,
            perturbation_interval=config.interval_reports or 1,
            burn_in_period=config.grace_reports or 0,
            custom_explore_fn=dict,  # not called: the params come from below
            quantile_fraction=0.25 if config.quantile_fraction is None else config.quantile_fraction,
            log_config=False,
        )
        self.tree = tree
        self.names = tuple(config.mutate or mutable(tree))
        self._resample = 0.25 if config.resample_probability is None else config.resample_probability
        self._draws = np.random.RandomState(seed)
        self._donors = random.Random(seed)
        self._exploited = exploited
        self._taken: dict[str, tuple[str, int]] = {}
        """By trial, the donor and the step of the state that it took over last."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        # Tune's own refuses searchers, which here only give the first params.
        self._trial_state[trial] = _PBTTrialState(trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = str(super().on_trial_result(tune_controller, trial, result))
        # Tune would take turns, for populations larger than what runs at a time: here all of it does.
        return TrialScheduler.CONTINUE if decision == TrialScheduler.PAUSE else decision

    def _exploit(self, tune_controller: Any, trial: Any, trial_to_clone: Any) -> None:
        at: Any = self._trial_state[trial].last_result
        state: Any = self._trial_state[trial_to_clone].last_result
        taken = trial_to_clone.trial_id, state.get(STATE_STEP, -1)
        if at.get(IS_LAST) or state.get(IS_LAST) or self._taken.get(trial.trial_id) == taken:
            return  # nothing would be left to train; or it did not get further from there
        self._taken[trial.trial_id] = taken
        super()._exploit(tune_controller, trial, trial_to_clone)

    def _checkpoint_or_exploit(self, *arguments: Any) -> None:
        with _drawing_from(self._donors):
            super()._checkpoint_or_exploit(*arguments)

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        params = self.explore(trial, trial_to_clone)
        at: Any = self._trial_state[trial].last_result
        state: Any = self._trial_state[trial_to_clone].last_result
        return dict(self._exploited(Exploit(trial.trial_id, trial_to_clone.trial_id, at, state, params))), {}

    def explore(self, trial: Any, donor: Any) -> dict[str, Any]:
        """The params with which `trial` goes on from the donor's state."""
        return mutated(self.tree, donor.config["params"], self.names, self._draws, self._resample)


class ModelledPopulation(Population):
    """PB2: a Gaussian process over time, score and params; these on a logarithm where the space has one."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._frames: Any = importlib.import_module("pandas")
        self._data = self._frames.DataFrame()
        self._nodes = {name: node for name, node in mutable(self.tree).items() if name in self.names}
        self._bounds = {name: tuple(_scaled(node, end) for end in node.numbers[:2]) for name, node in self._ranges()}

    def _ranges(self) -> Iterator[tuple[str, Distribution]]:
        for name, node in self._nodes.items():
            assert isinstance(node, Distribution)
            yield name, node

    def _save_trial_state(self, state: Any, time: int, result: dict[str, Any], trial: Any) -> Any:
        score = super()._save_trial_state(state, time, result, trial)
        row = {"Trial": str(trial), "Time": time, **self._point(trial.config["params"]), "Reward": score}
        self._data = self._frames.concat([self._data, self._frames.DataFrame([row])]).reset_index(drop=True)
        return score

    def explore(self, trial: Any, donor: Any) -> dict[str, Any]:
        propose: Any = importlib.import_module("ray.tune.schedulers.pb2")._explore
        params: dict[str, Any] = donor.config["params"]
        with _seeded(self._draws):
            point, self._data = propose(self._data, self._bounds, None, donor, trial, self._point(params))
        for name, node in self._ranges():
            params = written(params, name, into(node, _unscaled(node, point[name])))
        return params

    def _point(self, params: Mapping[str, Any]) -> dict[str, float]:
        return {name: _scaled(node, read(params, name)) for name, node in self._ranges()}


def _scaled(node: Distribution, value: float) -> float:
    return math.log10(value) if SHAPES[node.kind].log else float(value)


def _unscaled(node: Distribution, value: float) -> float:
    return float(10.0**value) if SHAPES[node.kind].log else float(value)


@contextmanager
def _drawing_from(own: random.Random) -> Iterator[None]:
    """Inside, the `random` module draws from `own`: Ray Tune picks donors with it."""
    before = random.getstate()
    random.setstate(own.getstate())
    try:
        yield
    finally:
        own.setstate(random.getstate())
        random.setstate(before)


@contextmanager
def _seeded(own: np.random.RandomState) -> Iterator[None]:
    """Inside, NumPy's module draws from what `own` gives: Ray's model starts its searches at such draws."""
    before = np.random.get_state()
    np.random.seed(int(own.randint(2**31)))
    try:
        yield
    finally:
        np.random.set_state(before)
