from __future__ import annotations

from typing import Any

import pytest
from ray.tune.search import Searcher

from ray_tracking.config import get_config
from ray_tracking.config.sweep import SweepConfig
from ray_tracking.config.sweep_points import problems_of
from ray_tracking.errors import ConfigError, MissingExtraError
from ray_tracking.runs.store import RunStore
from ray_tracking.runs.sweep import SweepStore, TrialStatus
from ray_tracking.runtime.sweep.bohb import BUDGET
from ray_tracking.runtime.sweep.book import Book
from ray_tracking.runtime.sweep.recorded import RecordedSearcher
from ray_tracking.runtime.sweep.searchers import how_many, make_searcher
from ray_tracking.storage import Storage

EVERY: dict[str, Any] = {
    "uniform": {"uniform": [-1, 1]},
    "quniform": {"quniform": [0, 1, 0.25]},
    "loguniform": {"loguniform": [1e-5, 1e-1]},
    "qloguniform": {"qloguniform": [0.5, 64, 0.5]},
    "randint": {"randint": [0, 9]},
    "qrandint": {"qrandint": [0, 9, 3]},
    "lograndint": {"lograndint": [1, 100]},
    "qlograndint": {"qlograndint": [2, 64, 2]},
    "nested": {"choice": {"choice": ["a", "b"]}, "fixed": 7},
    "optimizer": {"choice": [{"kind": "adam", "beta": {"uniform": [0.8, 0.99]}}, {"kind": "sgd"}]},
}
SMALL = {"uniform": EVERY["uniform"], "optimizer": EVERY["optimizer"]}
NORMAL = {"normal": {"normal": [0, 2]}, "qnormal": {"qnormal": [0, 2, 0.5]}}


def sweep(**keys: Any) -> SweepConfig:
    if keys.get("searcher") == "bohb":
        keys["scheduler"] = {"name": "hyperband", "max_reports": 9}
    found = get_config(overrides={"sweep": {"space": EVERY, **keys}}).sweep
    assert found is not None
    return found


def proposals(config: SweepConfig, count: int, seed: int = 3) -> list[Any]:
    """The first params, each trial ended with a value before the next is proposed."""
    searcher = make_searcher(config, "loss", "min", seed)
    found = []
    for number in range(count):
        params = searcher.suggest(f"t{number}")
        found.append(params)
        if params is not None and params != Searcher.FINISHED:
            result = {"loss": abs(params["uniform"]) if "uniform" in params else 1.0, "training_iteration": 1}
            searcher.on_trial_result(f"t{number}", result={**result, BUDGET: {"budget": 1}})
            searcher.on_trial_complete(f"t{number}", result={**result, "trial_id": f"t{number}"})
    return found


@pytest.mark.parametrize("name", ["random", "optuna", "hyperopt", "bohb"])
def test_proposals_are_points_of_the_space_and_the_same_for_a_seed(name):
    config = sweep(space=EVERY | (NORMAL if name not in ("optuna", "bohb") else {}), searcher=name, num_samples=16)
    found = proposals(config, 16)
    for point in found:
        assert problems_of(config.tree(), point) == []
        assert (point["quniform"] / 0.25).is_integer()
        assert point["qrandint"] % 3 == 0
        assert point["qlograndint"] % 2 == 0
        assert type(point["randint"]) is int
        assert point["nested"]["fixed"] == 7
    kinds = {point["optimizer"]["kind"] for point in found}
    assert kinds == {"adam", "sgd"}
    assert all(("beta" in point["optimizer"]) == (point["optimizer"]["kind"] == "adam") for point in found)
    assert found == proposals(config, 16)
    assert found != proposals(config, 16, seed=4)


@pytest.mark.parametrize("name", ["optuna", "hyperopt", "bohb"])
def test_a_searcher_learns(name):
    config = sweep(space={"uniform": {"uniform": [-1, 1]}}, searcher=name, num_samples=40)
    found = [abs(point["uniform"]) for point in proposals(config, 40)]
    assert sum(found[-20:]) / 20 < 0.4  # 0.5 if drawn blindly


@pytest.mark.parametrize("name", ["random", "optuna", "hyperopt", "bohb"])
def test_points_come_first_completed_by_constants(name):
    space = {"lr": {"uniform": [0, 1]}, "w": {"choice": [8, 16]}, "o": EVERY["optimizer"], "fixed": 3}
    point = {"lr": 0.125, "w": 16, "o": {"kind": "adam", "beta": 0.875}}
    first, second = proposals(sweep(space=space, points=[point], searcher=name), 2)
    assert first == {**point, "fixed": 3}
    assert second != first


def test_grids_are_tried_in_every_combination_with_draws_beside_them():
    config = sweep(
        space={"a": {"grid": [1, 2]}, "b": {"c": {"grid": ["x", "y"]}}, "d": {"uniform": [0, 1]}}, num_samples=2
    )
    assert how_many(config) == 8
    found = proposals(config, 9)
    assert [(point["a"], point["b"]["c"]) for point in found[:4]] == [(1, "x"), (1, "y"), (2, "x"), (2, "y")]
    assert [(point["a"], point["b"]["c"]) for point in found[4:8]] == [(1, "x"), (1, "y"), (2, "x"), (2, "y")]
    assert len({point["d"] for point in found[:8]}) == 8
    assert found[8] == Searcher.FINISHED


def test_a_searcher_by_its_dotted_name():
    config = sweep(
        space={"uniform": {"uniform": [-1, 1]}},
        searcher={"name": "ray.tune.search.hyperopt.HyperOptSearch", "options": {"n_initial_points": 2}},
    )
    assert all(-1 <= point["uniform"] <= 1 for point in proposals(config, 4))


@pytest.mark.parametrize(
    ("searcher", "words"),
    [
        ("ray.tune.search.nowhere.Nobody", "can't be imported"),
        ("pathlib.Path", "is no ray.tune.search.Searcher"),
        ({"name": "optuna", "options": {"no_such": 1}}, "does not take them"),
        ({"name": "hyperopt", "options": {"no_such": 1}}, "can't be made of these options"),
        ({"name": "bohb", "options": {"no_such": 1}}, r"options: .*no_such.*\.\n.*Allowed: random_fraction"),
        ({"name": "bohb", "options": {"random_fraction": 2}}, r"random_fraction: 2\.\n.*Allowed: 0 to 1\."),
    ],
)
def test_a_searcher_that_can_not_be_had_is_told(searcher, words):
    scheduler = {"name": "hyperband", "max_reports": 9}  # bohb goes with no other
    config = sweep(searcher=searcher, space={"a": {"uniform": [0, 1]}}, scheduler=scheduler)
    with pytest.raises(ConfigError, match=words):
        make_searcher(config, "loss", "min", 0)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("ray_tracking.extras.find_spec", lambda package: None)
    with pytest.raises(MissingExtraError, match=r"needs optuna(.|\n)*ray-tracking\[sweep\]"):
        make_searcher(sweep(searcher="optuna"), "loss", "min", 0)


@pytest.mark.parametrize("name", ["optuna", "bohb"])
def test_a_resumed_searcher_goes_on_as_if_nothing_had_happened(tmp_path, name):
    """Interrupted after the seventh of twelve proposals: the same twelve points, and unfinished trials come first."""

    def search(stop_after: int | None, place: str) -> list[Any]:
        store = SweepStore(RunStore(Storage.open(tmp_path / place)), "s")
        points: list[Any] = []
        while len(points) < 12:
            book = Book(store, "min", store.load())
            names: dict[str, str] = {}
            inner = make_searcher(sweep(searcher=name, space=SMALL, num_samples=12), "loss", "min", 1)
            searcher = RecordedSearcher(inner, book, "loss", "min", names.__setitem__)
            for _ in range(len(points), 12):
                tune_id = f"{stop_after}-{len(names)}"
                params = searcher.suggest(tune_id)["params"]
                book.start(tune_id)
                if len(book.trials) == stop_after:  # the driver dies with this trial under way
                    stop_after = None
                    break
                points.append(params)
                if name == "bohb":
                    searcher.arrive(tune_id, 3, abs(params["uniform"]))
                searcher.on_trial_complete(tune_id, {"loss": abs(params["uniform"]), "training_iteration": 1})
                book.end(book.number_of(tune_id), TrialStatus.COMPLETED, "completed", abs(params["uniform"]))
        assert [trial.number for trial in store.load()] == list(range(1, 13))
        return points

    whole = search(None, "whole")
    assert search(7, "interrupted") == whole
    if name == "bohb":  # the last proposals are of a model, not drawn as they would be without a value
        found = make_searcher(sweep(searcher=name, space=SMALL, num_samples=12), "loss", "min", 1)
        assert [found.suggest(f"t{number}") for number in range(12)] != whole


def test_bohb_believes_what_comes_nearest_to_a_whole_training():
    """After one report the losses lead astray; after nine they are true, as soon as there are enough of them."""
    config = sweep(
        searcher={"name": "bohb", "options": {"random_fraction": 0}},
        space={"x": {"uniform": [-1, 1]}},
        scheduler={"name": "hyperband", "max_reports": 9},
        num_samples=60,
    )
    searcher = make_searcher(config, "loss", "min", 0)
    found = []
    for number in range(60):
        name = f"t{number}"
        x = searcher.suggest(name)["x"]
        found.append(x)
        searcher.on_trial_result(name, {"loss": abs(x + 0.5), "training_iteration": 1, BUDGET: {"budget": 1}})
        searcher.on_trial_result(name, {"loss": -100.0, "training_iteration": 2, BUDGET: {}})
        if number >= 20:
            searcher.on_trial_result(name, {"loss": abs(x - 0.5), "training_iteration": 9, BUDGET: {"budget": 9}})
    astray, true = found[10:20], found[50:]
    assert sum(abs(x + 0.5) < 0.3 for x in astray) >= 7, astray
    assert sum(abs(x - 0.5) < 0.3 for x in true) >= 7, true


def test_a_searcher_that_proposes_otherwise_is_told_and_used(tmp_path, capsys):
    store = SweepStore(RunStore(Storage.open(tmp_path)), "s")
    first = RecordedSearcher(
        make_searcher(sweep(), "loss", "min", 1), Book(store, "min", []), "loss", "min", lambda *_: 0
    )
    params = first.suggest("a")["params"]
    again = RecordedSearcher(
        make_searcher(sweep(), "loss", "min", 2), Book(store, "min", store.load()), "loss", "min", lambda *_: 0
    )
    assert "does not propose what it did before" in capsys.readouterr().err
    assert again.suggest("b")["params"] == params  # what was begun is gone on with


def test_a_point_that_is_equal_to_an_option_is_given_to_the_searcher():
    """16.0 is 16, and of two ranges a value belongs to the one that holds it."""
    space = {"width": {"choice": [16, 32]}, "lr": {"choice": [{"uniform": [0, 1]}, {"uniform": [5, 6]}]}}
    config = sweep(space=space, searcher="optuna", points=[{"width": 16.0, "lr": 5.5}], num_samples=2)
    assert proposals(config, 1) == [{"width": 16, "lr": 5.5}]
