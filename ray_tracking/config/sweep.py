"""The section `sweep`: what is searched, how, for how long; checked before a cluster is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BeforeValidator, Strict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from ray_tracking.config import sweep_points
from ray_tracking.config.sections import Positive, Seconds, Section, Text, whole
from ray_tracking.config.sweep_population import bounded, mutable
from ray_tracking.config.sweep_space import (
    GRID,
    Distribution,
    Group,
    Node,
    Options,
    Problem,
    is_conditional,
    parse,
    walk,
)

S = TypeVar("S", bound=Section)
NOT_ALLOWED = "not_allowed"
"""The type of the errors that say themselves what is allowed, in the context of that name."""


class Searcher(NamedTuple):
    """What a searcher can't do, in words, None where it can."""

    conditional: str | None = None
    normal: str | None = None


SEARCHERS: Mapping[str, Searcher] = {
    "random": Searcher(),
    "grid": Searcher(),
    "optuna": Searcher(normal="Optuna has no normal distribution; use uniform, or another searcher"),
    "hyperopt": Searcher(),
    "bohb": Searcher(normal="BOHB has no normal distribution; use uniform, or another searcher"),
}
_OTHER = Searcher(conditional="not known to work with this searcher; use optuna, hyperopt or random")

POPULATIONS = frozenset({"pbt", "pb2"})
"""Schedulers whose trials train side by side, and take over each other's states."""
WITH_STATE = POPULATIONS | {"hyperband"}
"""Schedulers that stop trials and go on with them from the checkpoint that belongs to their last report."""
_POPULATION_KEYS = frozenset({"interval_reports", "grace_reports", "quantile_fraction", "mutate"})
_SCHEDULER_KEYS: Mapping[str, frozenset[str]] = {
    "none": frozenset(),
    "asha": frozenset({"max_reports", "grace_reports", "reduction_factor"}),
    "median": frozenset({"grace_reports"}),
    "hyperband": frozenset({"max_reports", "reduction_factor"}),
    "pbt": _POPULATION_KEYS | {"resample_probability"},
    "pb2": _POPULATION_KEYS,
}


def _named(value: Any) -> Any:
    """`asha` is short for `{name: asha}`."""
    return {"name": value} if isinstance(value, str) else value


def _checked(section: S, problems: list[Problem]) -> S:
    if problems:
        raise ValidationError.from_exception_data(
            type(section).__name__,
            [
                InitErrorDetails(
                    type=PydanticCustomError(NOT_ALLOWED, "{allowed}", {"allowed": problem.allowed}),
                    loc=problem.path,
                    input=problem.found,
                )
                for problem in problems
            ],
        )
    return section


class SearcherConfig(Section):
    """Who proposes the params of the next trial."""

    name: Text = "random"
    """random, grid, optuna, hyperopt, bohb (with the scheduler hyperband), or the dotted name of a `ray.tune.search`
    Searcher.
    """
    options: dict[str, Any] = {}
    """Keyword arguments for it."""


class SchedulerConfig(Section):
    """Who ends trials early, or changes them. Counted in reports: each time that training logs the metric is one."""

    name: Literal["none", "asha", "median", "hyperband", "pbt", "pb2"] = "none"
    """none, asha, median, hyperband, pbt or pb2."""
    max_reports: Positive | None = None
    """asha, hyperband: a trial is at its end after so many; null: without limit, which hyperband can't."""
    grace_reports: Positive | None = None
    """asha, median: no trial is ended before so many; pbt, pb2: none takes over another's state; null: 1."""
    reduction_factor: Annotated[int, BeforeValidator(whole), Ge(2)] | None = None
    """asha, hyperband: of so many trials one goes on; null: 3."""
    interval_reports: Positive | None = None
    """pbt, pb2: trials are compared each time that they have made so many; null: 1."""
    quantile_fraction: Annotated[float, Gt(0), Le(0.5)] | None = None
    """pbt, pb2: so many of the worst take over states of so many of the best; null: 0.25."""
    resample_probability: Annotated[float, Ge(0), Le(1)] | None = None
    """pbt: how often a param is drawn anew instead of moved; null: 0.25."""
    mutate: Annotated[tuple[Text, ...], Strict(False)] | None = None
    """pbt, pb2: params (dotted names) that change with it; null: all of the space but grids and conditional ones."""

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        used = _SCHEDULER_KEYS[self.name]
        known = ", ".join(sorted(used)) or "none"
        problems = [
            Problem((key,), self[key], f"null; the keys of {self.name}: {known}")
            for key in self
            if key != "name" and self[key] is not None and key not in used
        ]
        if self.name == "hyperband" and self.max_reports is None:
            allowed = "the number of reports of a whole training: hyperband plans by it"
            problems.append(Problem(("max_reports",), None, allowed))
        return _checked(self, problems)


class StopConfig(Section):
    """When the sweep or a trial ends before its time; null: not by this rule."""

    seconds: Seconds | None = None
    """The whole sweep, trials under way included, after this time."""
    trials_without_gain: Positive | None = None
    """The sweep, when so many trials in a row have ended without a new best."""
    reports: Positive | None = None
    """Each trial after so many reports of the metric."""
    plateau_reports: Positive | None = None
    """A trial whose metric has not become better in so many reports."""
    plateau_min_delta: Annotated[float, Ge(0)] = 0.0
    """What counts as better there: by more than this."""


class SweepConfig(Section):
    """A search over params: many runs of one training function."""

    metric: Text | None = None
    """What is searched for, a key that training logs; null: training.default.monitor."""
    mode: Literal["min", "max"] | None = None
    """Whether its best is the smallest or the largest; null: training.default.mode."""
    num_samples: Positive = 10
    """How many trials; with grids in the space, how often each of its points."""
    searcher: Annotated[SearcherConfig, BeforeValidator(_named)] = SearcherConfig()
    """Who proposes params: a name, or {name: ..., options: {...}}."""
    scheduler: Annotated[SchedulerConfig, BeforeValidator(_named)] = SchedulerConfig()
    """Who ends trials early: a name, or {name: asha, grace_reports: 2, ...}."""
    max_concurrent: Positive | None = None
    """Trials at a time; null: as many as the cluster holds."""
    space: dict[str, Any]
    """What is searched, below `params`: {lr: {loguniform: [1e-5, 1e-1]}, width: {choice: [16, 32]}}."""
    points: Annotated[tuple[dict[str, Any], ...], Strict(False)] = ()
    """Points of the space that are tried first."""
    seed: Annotated[int, BeforeValidator(whole), Ge(0), Lt(2**32)] | None = None
    """Seed of the search; null: the run's seed."""
    stop: StopConfig = StopConfig()
    """When it ends before all trials have been run."""
    keep_best_trials: Positive | None = None
    """Only so many trials, the best, keep their checkpoints when they have ended; null: all."""
    hang_secs: Seconds | None = None
    """A trial that gets no step further for so long is ended as one that died; null: never."""

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        tree, found = parse(self.space)
        problems = [Problem(("space", *path), value, allowed) for path, value, allowed in found]
        problems += [*self._of_searcher()]
        if not problems:
            problems = [*self._of_abilities(tree), *self._of_points(tree), *self._of_population(tree)]
        return _checked(self, problems)

    def tree(self) -> Group:
        """The space, parsed."""
        return parse(self.space)[0]

    def _of_searcher(self) -> Iterator[Problem]:
        name = self.searcher.name
        if name not in SEARCHERS and "." not in name:
            close = get_close_matches(name.lower(), SEARCHERS, n=1, cutoff=0.6)
            hint = f"; did you mean {close[0]}?" if close else ""
            yield Problem(("searcher", "name"), name, f"{', '.join(SEARCHERS)}, or a dotted name{hint}")
        if name in ("random", "grid") and self.searcher.options:
            yield Problem(("searcher", "options"), self.searcher.options, f"no options with {name}")
        if name == "bohb" and self.scheduler.name != "hyperband":
            allowed = "{name: hyperband, max_reports: N} with bohb, which learns from what trials reach at its rungs"
            yield Problem(("scheduler", "name"), self.scheduler.name, allowed)

    def _of_abilities(self, tree: Group) -> Iterator[Problem]:
        name = self.searcher.name
        lacks = SEARCHERS.get(name, _OTHER)
        nodes = list(walk(tree))
        for path, node in nodes:
            reason = _lacking(name, lacks, node)
            if reason:
                yield Problem(("space", *path), _value_at(self.space, path), reason)
        if name == GRID and not any(_is_grid(node) for _, node in nodes):
            yield Problem(("space",), self.space, "at least one {grid: [...]}, since the searcher is grid")

    def _of_population(self, tree: Group) -> Iterator[Problem]:
        name = self.scheduler.name
        if name not in POPULATIONS:
            return
        if self.searcher.name not in ("random", GRID):
            yield Problem(
                ("searcher", "name"), self.searcher.name, f"random or grid with {name}, which changes the params itself"
            )
        if self.num_samples == 1 and not any(_is_grid(node) for _, node in walk(tree)):
            yield Problem(("num_samples",), 1, f"at least 2 with {name}: its trials learn from each other")
        known = mutable(tree)
        for index, each in enumerate(self.scheduler.mutate or ()):
            if each not in known:
                allowed = "a param that the space draws: " + (", ".join(known) or "it draws none")
                yield Problem(("scheduler", "mutate", str(index)), each, allowed)
        chosen = {key: node for key, node in known.items() if key in (self.scheduler.mutate or known)}
        if not known:
            yield Problem(("space",), self.space, f"at least one param that {name} can change: not grids or conditions")
        for key, node in chosen.items():
            if name == "pb2" and not bounded(node):
                allowed = "uniform or loguniform with pb2; leave the param out of scheduler.mutate, or use pbt"
                yield Problem(("space", *key.split(".")), _value_at(self.space, tuple(key.split("."))), allowed)

    def _of_points(self, tree: Group) -> Iterator[Problem]:
        if self.points and any(_is_grid(node) for _, node in walk(tree)):
            yield Problem(("points",), list(self.points), "no points with a grid: all of its points are tried")
            return
        for index, point in enumerate(self.points):
            for path, found, allowed in sweep_points.problems_of(tree, point):
                yield Problem(("points", str(index), *path), found, allowed)


def _is_grid(node: Node) -> bool:
    return isinstance(node, Options) and node.kind == GRID


def _lacking(name: str, lacks: Searcher, node: Node) -> str | None:
    if _is_grid(node):
        return None if name in ("random", GRID) else f"a choice: {name} draws, only random and grid try each"
    if name == GRID and isinstance(node, Options | Distribution):
        return "a grid or a value, since the searcher is grid; with searcher: random both go together"
    if is_conditional(node):
        return lacks.conditional
    if isinstance(node, Distribution):
        return lacks.normal if node.kind.endswith("normal") else None
    return None


def _value_at(space: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        if isinstance(space, list | tuple):
            space = space[int(part)]
        else:
            space = next((value for key, value in space.items() if str(key) == part), None)
    return space
