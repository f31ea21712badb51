"""The learning curves of a sweep as figures: one metric over the steps of every trial. Pure.

In: `SweepFacts`. Out: figures for plotly.js.
"""

from __future__ import annotations

from collections.abc import Sequence

from ray_tracking.monitoring.report.curves import Curve
from ray_tracking.monitoring.report.figures import (
    Figure,
    Trace,
    axis,
    figure,
    log_or_linear,
    number,
    numbers,
    overlay,
)
from ray_tracking.monitoring.report.sweep_facts import SweepFacts, TrialFacts
from ray_tracking.monitoring.report.sweep_marks import by_colour, markers

MOST_CURVES = 16


def curve_keys(facts: SweepFacts) -> list[str]:
    """The metrics that have curves, the one that is searched for first; at most `MOST_CURVES`."""
    known = {key for curves in facts.curves.values() for key in curves.by_key}
    first = [facts.view.metric] if facts.view.metric in known else []
    return [*first, *sorted(known - set(first))][:MOST_CURVES]


def curves(facts: SweepFacts, key: str) -> Figure:
    """One metric over the steps of every trial; a marker at each end says how it ended."""
    data: list[Trace] = []
    ends: list[tuple[TrialFacts, Curve]] = []
    for line_colour, members in by_colour(facts):
        having = [
            (trial, facts.curves[trial.number].by_key[key])
            for trial in members
            if key in facts.curves[trial.number].by_key
        ]
        if having:
            data.append(_curve_trace(having, line_colour))
            ends += [pair for pair in having if len(pair[1].values)]
    values = [value for _, curve in ends for value in numbers(curve.values)]
    marks = [_end(curve) for _, curve in ends]
    data.append(
        {
            "type": "scatter",
            "mode": "markers",
            "x": [int(curve.steps[at]) for (_, curve), at in zip(ends, marks, strict=True)],
            "y": [number(curve.values[at]) for (_, curve), at in zip(ends, marks, strict=True)],
            "meta": {
                "counts": [int(curve.counts[at]) for (_, curve), at in zip(ends, marks, strict=True)],
                "minutes": [_minutes(curve)[at] for (_, curve), at in zip(ends, marks, strict=True)],
            },
            "customdata": [trial.number for trial, _ in ends],
            "hovertemplate": "%{text}<extra></extra>",
            "marker": markers([trial for trial, _ in ends], facts, 8),
        }
    )
    data.append(overlay("lines"))
    return figure(
        data, 380, xaxis=axis("step", showgrid=False, rangemode="tozero"), yaxis=axis(key, **log_or_linear(values))
    )


def _curve_trace(having: Sequence[tuple[TrialFacts, Curve]], line_colour: str) -> Trace:
    """Curves of one colour as one trace, with gaps between them: thousands of traces would be slow."""
    steps: list[float | None] = []
    counts: list[float | None] = []
    minutes: list[float | None] = []
    values: list[float | None] = []
    who: list[int | None] = []
    for trial, curve in having:
        steps += [*curve.steps.tolist(), None]
        counts += [*curve.counts.tolist(), None]
        minutes += [*_minutes(curve), None]
        values += [*numbers(curve.values), None]
        who += [trial.number] * len(curve.values) + [None]
    lone = all(len(curve.values) < 2 for _, curve in having)
    return {
        "type": "scatter",
        "mode": "markers" if lone else "lines",
        "x": steps,
        "y": values,
        "meta": {"counts": counts, "minutes": minutes},
        "customdata": who,
        "hovertemplate": "<b>%{y:.5g}</b> at %{x}<br>%{text}<extra></extra>",
        "line": {"color": line_colour, "width": 2.6 if line_colour == "@best" else 1.4},
    }


def _minutes(curve: Curve) -> list[float]:
    return [round(float(seconds) / 60, 4) for seconds in curve.times - curve.times[0]] if len(curve.times) else []


def _end(curve: Curve) -> int:
    """The index of the last finite value."""
    finite = [index for index, value in enumerate(curve.values) if number(value) is not None]
    return finite[-1] if finite else len(curve.values) - 1
