"""How trials look in all figures of a sweep: their marks, their colours, what is told of them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray_tracking.monitoring.report.figures import SYMBOLS, colour, label
from ray_tracking.monitoring.report.sweep_facts import SweepFacts, TrialFacts
from ray_tracking.monitoring.wording import number as shown
from ray_tracking.monitoring.wording import value


def hover(trial: TrialFacts, metric: str) -> str:
    """What is told of a trial wherever it is pointed at."""
    lines = [f"<b>Trial {trial.number}</b>  {label(trial.status)}", f"{label(metric)}  {shown(trial.value)}"]
    lines += [f"{label(name)}  {label(value(given))}" for name, given in list(trial.params.items())[:12]]
    if len(trial.params) > 12:
        lines.append(f"and {len(trial.params) - 12} more params")
    return "<br>".join(lines)


def trial_texts(facts: SweepFacts) -> Mapping[int, str]:
    return {trial.number: hover(trial, facts.view.metric) for trial in facts.trials}


def markers(trials: Sequence[TrialFacts], facts: SweepFacts, size: int) -> dict[str, Any]:
    colours = [colour(trial.rank, facts.ranked) for trial in trials]
    return {
        "size": [size + 3 if each == "@best" else size for each in colours],
        "color": colours,
        "symbol": [SYMBOLS.get(trial.status, "circle") for trial in trials],
        "opacity": 1,
        "line": {"width": [1.8 if trial.status not in ("completed", "stopped") else 0.8 for trial in trials],
                 "color": [
                     colour(trial.rank, facts.ranked) if trial.status not in ("completed", "stopped") else "@card"
                     for trial in trials
                 ]},
    }  # fmt: skip


def by_colour(facts: SweepFacts) -> list[tuple[str, list[TrialFacts]]]:
    """The trials by their colour, the worst first, so that the better ones are drawn over them."""
    groups: dict[str, list[TrialFacts]] = {}
    for trial in sorted(facts.trials, key=lambda trial: -(trial.rank or len(facts.trials) + 1)):
        groups.setdefault(colour(trial.rank, facts.ranked), []).append(trial)
    return list(groups.items())
