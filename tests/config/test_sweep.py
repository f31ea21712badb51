from __future__ import annotations

from typing import Any

import pytest
import yaml

from ray_tracking.config import get_config
from ray_tracking.config.sweep import SweepConfig
from ray_tracking.config.sweep_space import SHAPES, Constant, Distribution, Group, Options, parse, walk
from ray_tracking.errors import ConfigError

LR = {"lr": {"loguniform": [1e-5, 1e-1]}}
CONDITIONAL = {"optimizer": {"choice": [{"kind": "adam", "beta": {"uniform": [0.8, 0.99]}}, {"kind": "sgd"}]}}


def sweep(**keys: Any) -> SweepConfig:
    found = get_config(overrides={"sweep": {"space": LR, **keys}}).sweep
    assert found is not None
    return found


def problems(keys: dict[str, Any]) -> list[str]:
    """Each problem without its source."""
    with pytest.raises(ConfigError) as caught:
        get_config(overrides={"sweep": {"space": LR, **keys}})
    return [line.strip().removeprefix("overrides (--set): sweep.") for line in str(caught.value).splitlines()[1:]]


def test_a_space_of_every_distribution_is_read():
    numbers = {
        "uniform": [0, 1], "quniform": [0, 1, 0.25], "loguniform": [1e-5, 1], "qloguniform": [0.5, 8, 0.5],
        "normal": [0, 1], "qnormal": [0, 1, 0.5], "randint": [0, 9], "qrandint": [0, 9, 3], "lograndint": [1, 9],
        "qlograndint": [2, 8, 2],
    }  # fmt: skip
    assert set(numbers) == set(SHAPES)
    tree, found = parse({name: {name: given} for name, given in numbers.items()})
    assert found == []
    assert tree.items == {name: Distribution(name, tuple(map(float, given))) for name, given in numbers.items()}


def test_nested_params_choices_and_grids_are_told_from_distributions():
    tree, found = parse({"a": {"b": {"choice": [1, [2, 3]]}}, "c": {"grid_search": ["x"]}, "d": {"betas": [0.9, 0.99]}})
    assert found == []
    assert tree == Group(
        {
            "a": Group({"b": Options("choice", (Constant(1), Constant([2, 3])))}),
            "c": Options("grid", (Constant("x"),)),
            "d": Group({"betas": Constant([0.9, 0.99])}),
        }
    )


def test_ray_tunes_names_are_understood():
    assert parse({"a": {"randn": [0, 1]}})[0].items["a"] == Distribution("normal", (0.0, 1.0))


def test_an_option_that_draws_is_a_space_of_its_own():
    tree, found = parse(CONDITIONAL)
    assert found == []
    paths = {"/".join(path) for path, node in walk(tree) if isinstance(node, Distribution)}
    assert paths == {"optimizer/choice/0/beta"}


@pytest.mark.parametrize(
    ("space", "problem"),
    [
        ("{}", "space: found an empty mapping, allowed: at least one param, such as lr: {loguniform: [1e-5, 1e-1]}."),
        (
            "{lr: {loguniform: [0.1, 0.001]}}",
            "space.lr.loguniform: found [0.1, 0.001] (a list), allowed: a low end below the high end: "
            "{loguniform: [low, high]}, numbers.",
        ),
        (
            "{lr: {loguniform: [0, 1]}}",
            "space.lr.loguniform: found [0, 1] (a list), allowed: a low end above 0, of which there is a logarithm: "
            "{loguniform: [low, high]}, numbers.",
        ),
        (
            "{lr: {uniform: [a, 1]}}",
            'space.lr.uniform: found ["a", 1] (a list), allowed: {uniform: [low, high]}, numbers.',
        ),
        ("{a: {uniform: [1]}}", "space.a.uniform: found [1] (a list), allowed: {uniform: [low, high]}, numbers."),
        (
            "{a: {quniform: [0, 1, 0.3]}}",
            "space.a.quniform: found [0, 1, 0.3] (a list), allowed: ends that are multiples of q (0.3): "
            "{quniform: [low, high, q]}, numbers.",
        ),
        (
            "{a: {quniform: [0, 1, 0]}}",
            "space.a.quniform: found [0, 1, 0] (a list), allowed: a q above 0: {quniform: [low, high, q]}, numbers.",
        ),
        (
            "{a: {randint: [1.5, 3]}}",
            "space.a.randint: found [1.5, 3] (a list), allowed: whole numbers: {randint: [low, high]}, numbers.",
        ),
        (
            "{a: {normal: [0, 0]}}",
            "space.a.normal: found [0, 0] (a list), allowed: an sd above 0: {normal: [mean, sd]}, numbers.",
        ),
        ("{a: {choice: []}}", "space.a.choice: found [] (a list), allowed: a list with at least one option."),
        (
            "{a: {choice: 3}}",
            "space.a.choice: found 3 (a whole number), allowed: {choice: [option, option, ...]}.",
        ),
        (
            "{a: {b: {choice: [{c: {uniform: [2, 1]}}]}}}",
            "space.a.b.choice.0.c.uniform: found [2, 1] (a list), allowed: a low end below the high end: "
            "{uniform: [low, high]}, numbers.",
        ),
        (
            "{a: {uniform: [0, 1], q: 0.1}}",
            "space.a: found a mapping with the keys uniform, q, allowed: a distribution alone: "
            "{uniform: [...]} without other keys.",
        ),
        (
            "{a: {}}",
            "space.a: found an empty mapping, allowed: a value, a distribution, or a mapping with params in it.",
        ),
        (
            "{a: {grid: [{b: {uniform: [0, 1]}}]}}",
            "space.a.grid.0: found a mapping with the keys b, allowed: an option of grid without a grid or draw in it.",
        ),
        (
            "{a: {choice: [true, {1: 2}]}}",
            "space.a.choice.1.1: found 1 (a whole number), allowed: names of params that are text; quote the name.",
        ),
    ],
)
def test_what_is_wrong_with_a_space_is_told_by_key(space, problem):
    assert problems({"space": yaml.safe_load(space)}) == [problem]


def test_a_misspelt_distribution_is_not_taken_for_params():
    [problem] = problems({"space": {"lr": {"loguniforn": [0, 1]}}})
    assert problem.startswith("space.lr: found a mapping with the keys loguniforn, allowed: a distribution (uniform")
    assert problem.endswith("did you mean loguniform?")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "1e-5"])
def test_ends_are_finite_numbers(value):
    _, found = parse({"a": {"uniform": [0, value]}})
    assert [problem.path for problem in found] == [("a", "uniform")]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            {"searcher": "optun"},
            'searcher.name: found "optun" (text), allowed: random, grid, optuna, hyperopt, bohb, or a dotted name; '
            "did you mean optuna?",
        ),
        (
            {"searcher": "optuna", "space": {"a": {"normal": [0, 1]}}},
            "space.a: found a mapping with the keys normal, allowed: Optuna has no normal distribution; "
            "use uniform, or another searcher.",
        ),
        (
            {"searcher": "ray.tune.search.zoopt.ZOOptSearch", "space": CONDITIONAL},
            "space.optimizer: found a mapping with the keys choice, allowed: not known to work with this searcher; "
            "use optuna, hyperopt or random.",
        ),
        (
            {"searcher": "optuna", "space": {"a": {"grid": [1, 2]}}},
            "space.a: found a mapping with the keys grid, allowed: a choice: optuna draws, only random and grid "
            "try each.",
        ),
        (
            {"searcher": "bohb", "scheduler": "asha"},
            'scheduler.name: found "asha" (text), allowed: {name: hyperband, max_reports: N} with bohb, which learns '
            "from what trials reach at its rungs.",
        ),
        (
            {"searcher": "grid", "space": {"a": {"grid": [1, 2]}, "b": {"uniform": [0, 1]}}},
            "space.b: found a mapping with the keys uniform, allowed: a grid or a value, since the searcher is grid; "
            "with searcher: random both go together.",
        ),
        (
            {"searcher": "grid", "space": {"a": 1}},
            "space: found a mapping with the keys a, allowed: at least one {grid: [...]}, since the searcher is grid.",
        ),
        (
            {"scheduler": {"name": "median", "max_reports": 5}},
            "scheduler.max_reports: found 5 (a whole number), allowed: null; the keys of median: grace_reports.",
        ),
        (
            {"scheduler": {"name": "pb2", "resample_probability": 0.5}},
            "scheduler.resample_probability: found 0.5 (a number), allowed: null; the keys of pb2: grace_reports, "
            "interval_reports, mutate, quantile_fraction.",
        ),
        (
            {"scheduler": {"name": "pbt", "quantile_fraction": 0.6}},
            "scheduler.quantile_fraction: found 0.6 (a number), allowed: a number, above 0, at most 0.5, or null.",
        ),
        (
            {"scheduler": {"name": "pbt", "mutate": ["lrr"]}},
            'scheduler.mutate.0: found "lrr" (text), allowed: a param that the space draws: lr.',
        ),
        (
            {"scheduler": "pbt", "searcher": "optuna"},
            'searcher.name: found "optuna" (text), allowed: random or grid with pbt, which changes the params itself.',
        ),
        (
            {"scheduler": "pbt", "num_samples": 1},
            "num_samples: found 1 (a whole number), allowed: at least 2 with pbt: its trials learn from each other.",
        ),
        (
            {"scheduler": "pbt", "space": {"a": {"grid": [1, 2]}}},
            "space: found a mapping with the keys a, allowed: at least one param that pbt can change: not grids or "
            "conditions.",
        ),
        (
            {"scheduler": "pb2", "space": {"a": {"b": {"choice": [1, 2]}}, **LR}},
            "space.a.b: found a mapping with the keys choice, allowed: uniform or loguniform with pb2; leave the param "
            "out of scheduler.mutate, or use pbt.",
        ),
        (
            {"points": [{"lr": 1.0}]},
            "points.0.lr: found 1.0 (a number), allowed: a value of loguniform [1e-05, 0.1].",
        ),
        (
            {"points": [{"lrr": 0.01, "lr": 0.01}]},
            "points.0.lrr: found 0.01 (a number), allowed: the params of the space: lr.",
        ),
        (
            {"points": [{}]},
            "points.0.lr: found null, allowed: a value: a point names every param that the space draws.",
        ),
        ({"mode": "lowest"}, 'mode: found "lowest" (text), allowed: one of min, max, or null.'),
        ({"num_samples": 0}, "num_samples: found 0 (a whole number), allowed: a whole number, at least 1."),
    ],
)
def test_what_does_not_go_together_is_told_with_the_reason(keys, expected):
    assert problems(keys) == [expected]


def test_names_alone_are_short_for_their_sections():
    found = sweep(searcher="optuna", scheduler="asha")
    assert (found.searcher.name, found.scheduler.name) == ("optuna", "asha")
    assert sweep(searcher={"name": "optuna", "options": {"n_startup_trials": 3}}).searcher.options["n_startup_trials"]


def test_a_population_changes_all_of_the_space_or_what_is_named():
    space = {**LR, "width": {"choice": [16, 32]}, "of": {"decay": {"uniform": [0, 1]}}, **CONDITIONAL}
    assert sweep(space=space, scheduler="pbt").scheduler.mutate is None
    found = sweep(space=space, scheduler={"name": "pb2", "mutate": ["lr", "of.decay"], "interval_reports": 2})
    assert found.scheduler.mutate == ("lr", "of.decay")


def test_a_conditional_space_and_a_point_of_it_are_taken_by_those_that_can():
    point = {"optimizer": {"kind": "adam", "beta": 0.9}}
    for searcher in ("random", "optuna", "hyperopt"):
        assert sweep(space=CONDITIONAL, searcher=searcher, points=[point]).points == (point,)
    assert problems({"space": CONDITIONAL, "points": [{"optimizer": {"kind": "sgd", "beta": 0.9}}]})


def test_a_sweep_without_a_space_is_refused():
    with pytest.raises(ConfigError, match=r"sweep\.space is missing"):
        get_config(overrides={"sweep": {"num_samples": 3}})
