"""What the page of a sweep shows, gathered from storage: its trials, their params and curves, without secrets.

In: a store and a sweep's id. Out: `SweepFacts`. Nothing that a secret looks like goes past this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ray_tracking.config import redact
from ray_tracking.config.redaction import redact_text
from ray_tracking.monitoring.report.curves import Curves, points_for, read_curves
from ray_tracking.monitoring.report.importance import Importance, Tried, importance
from ray_tracking.monitoring.report.params import Axis, axes, flat
from ray_tracking.monitoring.sweep import SweepView, sweep_view
from ray_tracking.runs.store import RunStore
from ray_tracking.runs.sweep import SweepStore

_READERS = 8


@dataclass(frozen=True, slots=True)
class TrialFacts:
    """`params` flat, secrets removed; `rank` from 1 (the best), None without a value; `seconds` it ran."""

    number: int
    run_id: str
    status: str
    reason: str | None
    params: Mapping[str, Any]
    value: float | None
    rank: int | None
    steps: int
    seconds: float | None
    takeovers: tuple[str, ...] = ()
    """`trial 3 of step 120`: whose state it went on from, in order."""


@dataclass(frozen=True, slots=True)
class SweepFacts:
    """`default`: the trial of the point that was tried first, None if there was none. `search`: the section `sweep` of
    its configuration. `problems`: what could not be read."""

    view: SweepView
    trials: tuple[TrialFacts, ...]
    axes: tuple[Axis, ...]
    default: TrialFacts | None
    importance: Importance
    curves: Mapping[int, Curves]
    search: Mapping[str, Any]
    entrypoint: str | None
    problems: tuple[str, ...]

    @property
    def ranked(self) -> int:
        """How many trials have a rank."""
        return sum(trial.rank is not None for trial in self.trials)

    @property
    def best(self) -> TrialFacts | None:
        return None if self.view.best is None else self.trial(self.view.best.trial)

    def trial(self, number: int) -> TrialFacts:
        return next(trial for trial in self.trials if trial.number == number)


def sweep_facts(runs: RunStore, sweep_id: str, now: float) -> SweepFacts:
    """Raises as `sweep_view` does."""
    view = sweep_view(runs, sweep_id, now)
    config = redact(SweepStore(runs, sweep_id).config())
    search = config.get("sweep") or {}
    trials = _trials(view)
    every_axis = axes(search.get("space") or {}, [trial.params for trial in trials])
    limit = points_for(len(trials))
    with ThreadPoolExecutor(_READERS) as pool:
        curves = list(pool.map(lambda trial: read_curves(runs.directory(trial.run_id), limit), view.trials))
    return SweepFacts(
        view=view,
        trials=trials,
        axes=tuple(every_axis),
        default=_default(trials, search, config.get("params") or {}),
        importance=importance(_tried(trials), every_axis),
        curves={trial.number: found for trial, found in zip(trials, curves, strict=True)},
        search=search,
        entrypoint=_clean(runs.load(sweep_id).entrypoint),
        problems=tuple(
            f"Trial {trial.number}: {redact_text(found.problem)}."
            for trial, found in zip(trials, curves, strict=True)
            if found.problem
        ),
    )


def _trials(view: SweepView) -> tuple[TrialFacts, ...]:
    ranks = {number: place for place, number in enumerate(view.ranking, 1)}
    return tuple(
        TrialFacts(
            trial.trial,
            trial.run_id,
            trial.status,
            _clean(trial.reason),
            flat(redact(dict(trial.params))),
            trial.value,
            ranks.get(trial.trial),
            trial.steps,
            trial.ended - trial.started if trial.ended and trial.started else None,
            tuple(_donor(each) for each in trial.takeovers),
        )
        for trial in view.trials
    )


def _donor(takeover: Mapping[str, Any]) -> str:
    number = str(takeover.get("run_id", "")).rpartition(".trial-")[2].lstrip("0")
    return f"trial {number or '?'} of step {takeover.get('step', '?')}"


def _tried(trials: Sequence[TrialFacts]) -> list[Tried]:
    """Those to judge params by: failed ones ended anywhere."""
    return [
        Tried(trial.params, trial.value) for trial in trials if trial.value is not None and trial.status != "failed"
    ]


def _default(trials: Sequence[TrialFacts], search: Mapping[str, Any], params: Mapping[str, Any]) -> TrialFacts | None:
    """The trial of the first of `points`, or else of what `params` says without a search."""
    points = search.get("points") or ()
    wanted = flat(points[0]) if points else flat(params)
    if not wanted:
        return None
    for trial in trials:
        known = wanted if points else {key: value for key, value in wanted.items() if key in trial.params}
        complete = all(key in trial.params and trial.params[key] == value for key, value in known.items())
        if complete and known and (points or len(known) == len(trial.params)):
            return trial
    return None


def _clean(text: str | None) -> str | None:
    return None if text is None else redact_text(text)
