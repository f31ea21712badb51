from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_tracking.config import get_config
from ray_tracking.config.sweep import SweepConfig
from ray_tracking.config.sweep_points import problems_of
from ray_tracking.config.sweep_population import mutable
from ray_tracking.runs.store import RunStore
from ray_tracking.runs.sweep import SweepStore
from ray_tracking.runtime.sweep.adapting import adapt, built_with
from ray_tracking.runtime.sweep.book import Book, Exploit
from ray_tracking.runtime.sweep.mutation import mutated
from ray_tracking.runtime.sweep.population import ModelledPopulation, Population
from ray_tracking.runtime.sweep.recorded import RecordedSearcher
from ray_tracking.runtime.sweep.reporting import REPORTS, STATE_STEP
from ray_tracking.runtime.sweep.searchers import make_searcher
from ray_tracking.runtime.sweep.space import draw
from ray_tracking.runtime.sweep.stopping import Reasons, make_scheduler
from ray_tracking.storage import Storage
from tests.runtime.sweep.test_searchers import EVERY, NORMAL

TREE_CONFIG: dict[str, Any] = {"space": EVERY | NORMAL | {"conditional": EVERY["optimizer"], "fixed": "x"}}


def sweep(**keys: Any) -> SweepConfig:
    found = get_config(overrides={"sweep": {**TREE_CONFIG, "scheduler": "pbt", **keys}}).sweep
    assert found is not None
    return found


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), resample=st.sampled_from([0.0, 0.5, 1.0]))
def test_mutated_params_are_points_of_the_space(seed, resample):
    tree = sweep().tree()
    random = np.random.RandomState(seed)
    params = draw(tree, random)
    found = mutated(tree, params, tuple(mutable(tree)), random, resample)
    assert problems_of(tree, found) == []
    assert (found["quniform"] / 0.25).is_integer()
    assert found["qrandint"] % 3 == 0
    assert type(found["randint"]) is int
    assert found["optimizer"] == params["optimizer"]  # what hangs on a choice stays


def test_a_move_is_a_fifth_and_stays_within_the_ends_and_a_whole_number_moves():
    tree = sweep(space={"lr": {"uniform": [0, 1]}, "n": {"randint": [1, 9]}, "w": {"choice": [1, 2, 3]}}).tree()
    found = [
        mutated(tree, {"lr": 0.5, "n": 2, "w": 2}, ("lr", "n", "w"), np.random.RandomState(n), 0.0) for n in range(30)
    ]
    assert {each["lr"] for each in found} == {0.4, 0.6}
    assert {each["n"] for each in found} == {1, 3}
    assert {each["w"] for each in found} == {1, 3}
    kept = mutated(tree, {"lr": 1.0, "n": 8, "w": 1}, ("lr",), np.random.RandomState(1), 0.0)
    assert kept["lr"] in (0.8, 1.0)
    assert (kept["n"], kept["w"]) == (8, 1)


class Tune:
    """The part of Ray Tune's controller that a population uses."""

    def __init__(self) -> None:
        self.trials: list[Any] = []
        self.paused: list[Any] = []

    def get_trials(self) -> list[Any]:
        return self.trials

    def _schedule_trial_save(self, trial: Any, result: Any) -> Any:
        return SimpleNamespace(metrics=result)

    def pause_trial(self, trial: Any, should_checkpoint: bool) -> None:
        self.paused.append(trial)
        trial.status = "PAUSED"


class Trial:
    def __init__(self, number: int, params: dict[str, Any]) -> None:
        self.trial_id, self.status = f"t{number}", "RUNNING"
        self.config: dict[str, Any] = {"params": params, "takeover": None}
        self.experiment_tag = ""
        self.run_metadata = SimpleNamespace(checkpoint_manager=SimpleNamespace())
        self.set_experiment_tag = lambda tag: None

    def set_config(self, config: dict[str, Any]) -> None:
        self.config = config

    def is_finished(self) -> bool:
        return False


def exploits(config: SweepConfig, seed: int = 1, count: int = 4) -> list[Exploit]:
    """What a population does whose trials report the distance of their `lr` from 0.3, in turn."""
    done: list[Exploit] = []

    def exploited(exploit: Exploit) -> dict[str, Any]:
        done.append(exploit)
        return {"params": exploit.params, "takeover": {"number": len(done)}}

    scheduler: Any = make_scheduler(
        config, "loss", "min", Reasons(), seed=seed, exploited=exploited, total=4, at_once=4, arrived=print
    )
    tune = Tune()
    tune.trials = [Trial(n, {"lr": 0.1 + 0.2 * n, "fixed": 7}) for n in range(count)]
    for trial in tune.trials:
        scheduler.on_trial_add(tune, trial)
    for reports in range(1, 5):
        for trial in tune.trials:
            trial.status = "RUNNING"
            loss = abs(trial.config["params"]["lr"] - 0.3) / reports
            result = {"loss": loss, REPORTS: reports, "step": 10 * reports, STATE_STEP: 10 * reports}
            scheduler.on_trial_result(tune, trial, result)
    return done


@pytest.mark.parametrize("name", ["pbt", "pb2"])
def test_the_worst_take_over_from_the_best_with_params_of_the_space_the_same_for_a_seed(name):
    config = sweep(space={"lr": {"uniform": [0, 1]}, "fixed": 7}, scheduler={"name": name, "quantile_fraction": 0.25})
    found = exploits(config)
    assert found
    assert all(exploit.trial != exploit.donor for exploit in found)
    assert all(problems_of(config.tree(), exploit.params) == [] for exploit in found)
    assert all(exploit.state["loss"] <= exploit.at["loss"] for exploit in found)
    assert found[0].donor == "t1"
    assert found == exploits(config)
    if name == "pbt":
        assert found != exploits(config, seed=2)


def test_a_population_of_each_kind_is_made():
    space = {"lr": {"loguniform": [1e-4, 1]}, "n": {"randint": [1, 9]}}
    made = [
        make_scheduler(
            sweep(space=space, scheduler={"name": name, "mutate": ["lr"]}), "m", "min", Reasons(), seed=0,
            exploited=lambda exploit: {}, total=4, at_once=4, arrived=print,
        )
        for name in ("pbt", "pb2")
    ]  # fmt: skip
    assert [type(each) for each in made] == [Population, ModelledPopulation]


def test_a_takeover_is_on_record_and_a_resumed_searcher_knows_what_it_proposed(tmp_path, capsys):
    store = SweepStore(RunStore(Storage.open(tmp_path)), "s")

    def searcher(book: Book) -> RecordedSearcher:
        inner = make_searcher(sweep(space={"lr": {"uniform": [0, 1]}}), "loss", "min", 1)
        return RecordedSearcher(inner, book, "loss", "min", lambda *_: None)

    book = Book(store, "min", [])
    first = searcher(book)
    before = [first.suggest(name)["params"] for name in ("a", "b")]
    at, state = {"step": 10, REPORTS: 1}, {"step": 20, STATE_STEP: 20, REPORTS: 2}
    book.take_over(Exploit("b", "a", at, state, {"lr": 0.25}))
    again = Book(store, "min", store.load())
    second = searcher(again)
    assert "does not propose what it did before" not in capsys.readouterr().err
    configs = [second.suggest(name) for name in ("c", "d")]
    assert configs[0] == {"params": before[0], "takeover": None}
    takeover = {"number": 1, "run_id": "s.trial-001", "step": 20, "reports": 2}
    assert configs[1] == {"params": {"lr": 0.25}, "takeover": takeover}
    assert again[2].takeovers[0]["before"] == again[2].proposed == before[1]


@pytest.mark.parametrize("scheduled", [False, True])
def test_an_optimizer_with_anothers_state_trains_on_with_its_own_rates(scheduled):
    def make(lr: float, decay: float) -> dict[str, Any]:
        weight = torch.nn.Parameter(torch.ones(2))
        optimizer = torch.optim.AdamW([weight], lr=lr, weight_decay=decay)
        made: dict[str, Any] = {"optimizer": optimizer}
        if scheduled:
            made["scheduler"] = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return made

    donor = make(0.1, 0.0)
    donor["optimizer"].param_groups[0]["params"][0].grad = torch.ones(2)
    donor["optimizer"].step()
    if scheduled:
        donor["scheduler"].step()
    own = make(0.4, 0.3)
    built = built_with(own)
    for name, value in own.items():
        value.load_state_dict(donor[name].state_dict())
    adapt(own, built)
    group = own["optimizer"].param_groups[0]
    assert group["lr"] == pytest.approx(0.2 if scheduled else 0.4)
    assert group["weight_decay"] == 0.3
    assert own["optimizer"].state_dict()["state"][0]["step"] == 1
    if scheduled:
        own["scheduler"].step()
        assert group["lr"] == pytest.approx(0.1)
        assert own["scheduler"].get_last_lr() == [pytest.approx(0.1)]
