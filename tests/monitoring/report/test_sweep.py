from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from typing import Any

import plotly.graph_objects as go
import pytest

from ray_tracking.monitoring.report import sweep_curves, sweep_figures, sweep_params
from ray_tracking.monitoring.report.sweep import render, sweep_report
from ray_tracking.monitoring.report.sweep_facts import SweepFacts, sweep_facts
from ray_tracking.runs.record import Status
from ray_tracking.runs.store import RunStore
from ray_tracking.runs.sweep import SweepStore
from tests.monitoring.builder import RunBuilder
from tests.monitoring.sweep_builder import BEST, FAILED, LOST, STARTED, STOPPED, a_sweep

NOW = STARTED + 1000


@pytest.fixture
def facts(store: RunStore) -> SweepFacts:
    a_sweep(store)
    return sweep_facts(store, "s", NOW)


def _plain(page: str) -> str:
    """The text of a page, without its scripts and styles."""
    body = re.sub(r"<(script|style)[^>]*>.*?</\1>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


def _painted(figure: Any) -> go.Figure:
    """The figure as plotly checks it, which knows every property; colours have names in it that the page puts in."""
    return go.Figure(json.loads(re.sub(r'"@[a-z0-9-]+"', '"#112233"', json.dumps(figure))))


def test_the_best_its_checkpoint_and_the_default_stand_first(facts: SweepFacts) -> None:
    page = _plain(render(facts, NOW))
    assert "Search for the smallest val/loss: 12 trials (9 completed, 2 failed, 1 stopped)" in page
    assert "Best val/loss 0.225 trial 8 of 12" in page
    assert "The default (trial 1) came to 0.2875: −0.0625" in page
    assert f"s.trial-{BEST:03d}/attempt-001/step-000080" in page


def test_history_has_every_trial_and_the_best_so_far(facts: SweepFacts) -> None:
    figure = sweep_figures.history(facts)
    assert figure is not None
    _painted(figure)
    best, points, lost, _ = figure["data"]
    assert points["x"] == [number for number in range(1, 13) if number != LOST]
    assert lost["x"] == [LOST]
    assert best["y"][: len(points["x"])] == pytest.approx([0.2875] * 7 + [0.225] * 4)
    assert best["x"][:-1] == points["x"]
    marks = dict(zip(points["x"], points["marker"]["symbol"], strict=True))
    assert (marks[FAILED], marks[STOPPED], marks[BEST]) == ("x-thin-open", "square", "circle")


def test_a_failed_trial_is_never_the_best_so_far(store: RunStore) -> None:
    sweep = a_sweep(store)
    (failed,) = [trial for trial in sweep.load() if trial.number == FAILED]
    sweep.save(replace(failed, value=0.0001))
    figure = sweep_figures.history(sweep_facts(store, "s", NOW))
    assert figure is not None
    assert min(figure["data"][0]["y"]) == pytest.approx(0.225)


def test_a_trial_has_its_colour_in_every_figure(facts: SweepFacts) -> None:
    history, parallel = sweep_figures.history(facts), sweep_params.parallel(facts)
    assert history is not None
    assert parallel is not None
    of_history = dict(zip(history["data"][1]["customdata"], history["data"][1]["marker"]["color"], strict=True))
    for figure in (parallel, sweep_curves.curves(facts, "val/loss")):
        for trace in figure["data"]:
            for trial in {each for each in trace.get("customdata", []) if each is not None}:
                if trace["mode"] == "lines" and trial != LOST:
                    assert trace["line"]["color"] == of_history[trial]
    assert of_history[BEST] == "@best"


def test_every_figure_is_one_that_plotly_knows(facts: SweepFacts) -> None:
    for figure in (sweep_params.parallel(facts), sweep_params.slices(facts), sweep_figures.shares(facts.importance)):
        assert figure is not None
        _painted(figure)
    for key in sweep_curves.curve_keys(facts):
        _painted(sweep_curves.curves(facts, key))


def test_a_line_goes_through_the_params_to_the_value(facts: SweepFacts) -> None:
    figure = sweep_params.parallel(facts)
    assert figure is not None
    best = next(trace for trace in figure["data"] if trace.get("line", {}).get("color") == "@best")
    axes = {axis.name: axis for axis in sweep_params.chosen_axes(facts)}
    assert list(axes) == ["lr", "width", "optimizer.kind", "optimizer.momentum"]
    assert best["y"] == pytest.approx([2 / 3, 1.0, 1.0, 0.56 / 0.9, 0.0, None], nan_ok=True)
    without = [trace for trace in figure["data"] for y in trace["y"] if y is not None and y < 0]
    assert without  # adam has no momentum


def test_curves_have_gaps_between_trials_and_a_mark_at_each_end(facts: SweepFacts) -> None:
    figure = sweep_curves.curves(facts, "val/loss")
    *lines, ends, _ = figure["data"]
    assert sorted(ends["customdata"]) == [number for number in range(1, 13) if number != LOST]
    at = ends["customdata"].index(STOPPED)
    assert (ends["x"][at], ends["meta"]["counts"][at], ends["meta"]["minutes"][at]) == (20, 2, 1.0)
    for trace in lines:
        for index, trial in enumerate(trace["customdata"][:-1]):
            following = trace["customdata"][index + 1]
            assert trial is None or following is None or trial == following
        assert len(trace["x"]) == len(trace["y"]) == len(trace["meta"]["minutes"]) == len(trace["customdata"])


def test_secrets_are_removed(store: RunStore) -> None:
    sweep = a_sweep(store)
    (trial,) = [trial for trial in sweep.load() if trial.number == 2]
    secret = "hf_abcdefghijklmnopqrstuvwxyz012345"
    params = {**trial.params, "api_key": "plainlooking", "db": {"password": "hunter2"}, "note": secret}
    sweep.save(replace(trial, params=params, reason=f"ValueError: token={secret}"))
    page = sweep_report(store, "s", NOW)
    for hidden in ("plainlooking", "hunter2", secret):
        assert hidden not in page
    assert "[removed]" in page


def test_whose_state_a_trial_went_on_from_is_told(store: RunStore) -> None:
    sweep = a_sweep(store)
    (trial,) = [trial for trial in sweep.load() if trial.number == 2]
    takeover = {"number": 1, "run_id": "s.trial-008", "step": 40, "before": dict(trial.params)}
    sweep.save(replace(trial, takeovers=(takeover,)))
    page = _plain(sweep_report(store, "s", NOW))
    assert "went on from trial 8 of step 40" in page
    assert "Trials changed params while they ran: each is judged by its last." in page


def test_the_policy_lets_nothing_in_and_fits_the_scripts(facts: SweepFacts) -> None:
    page = render(facts, NOW)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy is not None
    allowed = policy[1].replace("&#x27;", "'")
    assert allowed.startswith("default-src 'none'; script-src 'sha256-")
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert re.findall(r"'sha256-([^']+)'", allowed) == digests
    assert "unsafe-eval" not in allowed
    assert not re.search(r'(?:src|href)="(?!data:,)', page.split("<script>")[0])


@pytest.mark.parametrize("trials", [0, 1, 2])
def test_little_is_said_in_words(store: RunStore, trials: int) -> None:
    a_sweep(store, trials=trials)
    page = _plain(sweep_report(store, "s", NOW))
    if trials:
        assert "It takes 6 trials with a value to judge by" in page
    else:
        assert "No trial has got to a value that counts." in page
        assert "No trial has a value yet." in page
        assert "No trial has logged a metric yet." in page


def test_one_that_is_under_way_says_so(store: RunStore) -> None:
    RunBuilder(store, "s")
    SweepStore(store, "s").create("val/loss", "min", {"sweep": {"space": {"lr": {"uniform": [0, 1]}}}})
    page = _plain(sweep_report(store, "s"))
    assert "The sweep was not over then" in page
    assert Status.RUNNING.value in page


def test_many_params_are_cut_to_those_that_mattered(store: RunStore) -> None:
    names = [f"p{index}" for index in range(14)]
    sweep = a_sweep(store, space={name: {"uniform": [0, 1]} for name in names})
    for trial in sweep.load():
        decides = {"p13": float(trial.value or 0)}
        params = {name: ((trial.number * (index + 3)) % 11) / 11 for index, name in enumerate(names)}
        sweep.save(replace(trial, params={**params, **decides}))
    facts = sweep_facts(store, "s", NOW)
    chosen = [axis.name for axis in sweep_params.chosen_axes(facts)]
    assert len(chosen) == sweep_params.MOST_AXES
    assert "p13" in chosen
    assert "Shown are the 9 that mattered most." in _plain(render(facts, NOW))
