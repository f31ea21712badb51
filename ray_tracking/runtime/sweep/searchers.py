"""Who proposes params: our own draws and grids, Optuna, BOHB, and the searchers of Ray Tune.

Each is a `ray.tune.search.Searcher` that gives params, nested as in the space, and is told of ends.
"""

from __future__ import annotations

import importlib
import inspect
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ray.tune.search import Searcher

from ray_tracking.config.sweep import SEARCHERS, SweepConfig
from ray_tracking.config.sweep_space import Group
from ray_tracking.errors import ConfigError, MissingExtraError
from ray_tracking.extras import require
from ray_tracking.runtime.sweep.space import as_tune, ask, completed, draw, grids, named, plain


def how_many(config: SweepConfig) -> int:
    """Trials in all."""
    return config.num_samples * len(grids(config.tree()))


def _drawn_blindly(config: SweepConfig, most: int) -> int:
    """Trials before a searcher's model begins: its own number `most`, of a short sweep a third."""
    return max(1, min(most, how_many(config) // 3))


def make_searcher(config: SweepConfig, metric: str, mode: str, seed: int) -> Searcher:
    """Raises MissingExtraError for one whose package is not installed, ConfigError for one that can't be made."""
    tree = config.tree()
    points = [completed(tree, point) for point in config.points]
    name = config.searcher.name
    if name in ("random", "grid"):
        return DrawSearcher(tree, points, config.num_samples, seed, metric, mode)
    if name == "optuna":
        require("sweep", "optuna")
        options = {"n_startup_trials": _drawn_blindly(config, 10), **config.searcher.options}
        return OptunaSearcher(tree, points, seed, metric, mode, options)
    if name == "bohb":
        require("sweep", "optuna")
        from ray_tracking.runtime.sweep.bohb import BohbSearcher

        return BohbSearcher(tree, points, seed, metric, mode, config.searcher.options)
    if name == "hyperopt":
        require("sweep", "hyperopt")
        from ray.tune.search.hyperopt import HyperOptSearch

        given = {"random_state_seed": seed, "n_initial_points": _drawn_blindly(config, 20)}
        return _of_tune(HyperOptSearch, config, tree, points, metric, mode, given)
    return _of_tune(_load(name), config, tree, points, metric, mode, {"seed": seed})


class DrawSearcher(Searcher):
    """Draws from the space, or with grids in it goes through all of their combinations, `num_samples` times."""

    def __init__(
        self, tree: Group, points: Sequence[Mapping[str, Any]], num_samples: int, seed: int, metric: str, mode: str
    ) -> None:
        super().__init__(metric=metric, mode=mode)
        self._params = self._all(tree, points, num_samples, np.random.RandomState(seed))

    @staticmethod
    def _all(
        tree: Group, points: Sequence[Mapping[str, Any]], num_samples: int, random: np.random.RandomState
    ) -> Iterator[dict[str, Any]]:
        yield from map(dict, points)
        for _ in range(num_samples):
            for grid in grids(tree):
                yield draw(tree, random, grid)

    def suggest(self, trial_id: str) -> Any:
        return next(self._params, Searcher.FINISHED)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing is learnt."""


class OptunaSearcher(Searcher):
    """Optuna's TPE by its ask and tell: with nested and conditional params, which Tune's own bridge has not."""

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
        try:
            sampler = optuna.samplers.TPESampler(seed=seed, **options)
        except TypeError as error:
            raise ConfigError(f"sweep.searcher.options: Optuna's TPESampler does not take them: {error}.") from error
        direction = "minimize" if mode == "min" else "maximize"
        self._study = optuna.create_study(direction=direction, sampler=sampler)
        self._states = optuna.trial.TrialState
        self._tree = tree
        self._asked: dict[str, Any] = {}
        for point in points:
            self._study.enqueue_trial(dict(named(tree, point)))

    def suggest(self, trial_id: str) -> dict[str, Any]:
        trial = self._asked[trial_id] = self._study.ask()
        params: dict[str, Any] = ask(self._tree, trial)
        return params

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial = self._asked.pop(trial_id, None)
        if trial is None:
            return
        value = (result or {}).get(self.metric)
        if error or value is None or not np.isfinite(value):
            self._study.tell(trial, state=self._states.FAIL)
        else:
            self._study.tell(trial, float(value))


def _load(name: str) -> type[Searcher]:
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"sweep.searcher.name: {name!r} can't be imported: {error}.",
            hint=f"Allowed: {', '.join(SEARCHERS)}, or a Searcher such as ray.tune.search.hyperopt.HyperOptSearch.",
        ) from error
    if not (isinstance(found, type) and issubclass(found, Searcher)):
        raise ConfigError(f"sweep.searcher.name: {name!r} is no ray.tune.search.Searcher.")
    return found


def _of_tune(
    kind: type[Searcher],
    config: SweepConfig,
    tree: Group,
    points: Sequence[Mapping[str, Any]],
    metric: str,
    mode: str,
    given: Mapping[str, Any],
) -> Searcher:
    """A searcher of Ray Tune's, given what its constructor takes of our settings."""
    known = inspect.signature(kind).parameters
    settings: dict[str, Any] = {"metric": metric, "mode": mode, **given}
    arguments = {key: value for key, value in settings.items() if key in known} | dict(config.searcher.options)
    try:
        made = kind(**arguments)
        made.set_search_properties(metric, mode, as_tune(tree))
    except (AssertionError, ImportError) as error:
        raise MissingExtraError(f"sweep.searcher {config.searcher.name}: {str(error).strip()}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"sweep.searcher {config.searcher.name} can't be made of these options: {error}") from error
    return PlainSearcher(made, points)


class PlainSearcher(Searcher):
    """Another searcher, its params as plain Python values. Points come first, and it does not learn from them.

    HyperOptSearch, given points of a conditional space, looks for their options for ever (Ray 2.60).
    """

    def __init__(self, inner: Searcher, points: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(metric=inner.metric, mode=inner.mode)
        self._inner = inner
        self._points = deque(points)
        self._first: set[str] = set()

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        return bool(self._inner.set_max_concurrency(max_concurrent))

    def suggest(self, trial_id: str) -> Any:
        if self._points:
            self._first.add(trial_id)
            return dict(self._points.popleft())
        found = self._inner.suggest(trial_id)
        return plain(found) if isinstance(found, Mapping) else found

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if trial_id not in self._first:
            self._inner.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if trial_id not in self._first:
            self._inner.on_trial_complete(trial_id, result=result, error=error)
