"""The history of a sweep, and how much each param mattered, as figures. Pure.

In: `SweepFacts`. Out: figures for plotly.js, None where there is nothing to draw.
"""

from __future__ import annotations

from ray_tracking.monitoring.report.figures import Figure, Trace, axis, figure, label, log_or_linear, numbers, overlay
from ray_tracking.monitoring.report.importance import Importance
from ray_tracking.monitoring.report.sweep_facts import SweepFacts
from ray_tracking.monitoring.report.sweep_marks import markers


def history(facts: SweepFacts) -> Figure | None:
    """The value of each trial, in the order they were proposed, and the best so far."""
    valued = [trial for trial in facts.trials if trial.value is not None]
    if not valued:
        return None
    metric, sign = facts.view.metric, 1 if facts.view.mode == "min" else -1
    so_far: list[float] = []
    for trial in valued:
        if trial.status == "failed":
            so_far.append(so_far[-1] if so_far else float("nan"))
            continue
        assert trial.value is not None
        before = [value for value in so_far[-1:] if value == value]
        so_far.append(min([*before, trial.value], key=lambda value: sign * value))
    last = max(trial.number for trial in facts.trials)
    best_line: Trace = {
        "type": "scatter",
        "mode": "lines",
        "x": [*(trial.number for trial in valued), last + 0.4],
        "y": numbers([*so_far, so_far[-1]]),
        "line": {"color": "@best", "width": 2, "shape": "hv"},
        "hoverinfo": "skip",
    }
    points: Trace = {
        "type": "scatter",
        "mode": "markers",
        "x": [trial.number for trial in valued],
        "y": numbers(trial.value for trial in valued if trial.value is not None),
        "customdata": [trial.number for trial in valued],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": markers(valued, facts, 10),
    }
    data = [best_line, points]
    lost = [trial for trial in facts.trials if trial.value is None and trial.status == "failed"]
    if lost:
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [trial.number for trial in lost],
                "y": [0.02] * len(lost),
                "yaxis": "y2",
                "customdata": [trial.number for trial in lost],
                "hovertemplate": "%{text}<extra></extra>",
                "marker": markers(lost, facts, 9),
            }
        )
    data.append(overlay("markers"))
    return figure(
        data,
        320,
        xaxis=axis("trial", range=[0.4, last + 0.6], tickformat="d", dtick=None if last > 15 else 1, showgrid=False),
        yaxis=axis(metric, **log_or_linear(trial.value for trial in valued)),
        yaxis2={"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True},
    )


def shares(found: Importance) -> Figure | None:
    """How much each param mattered, with whiskers."""
    if not found.shares:
        return None
    rows = list(reversed(found.shares))
    names = [row.param if row.among is None else f"{row.param} (in {row.among})" for row in rows]
    marks = ["@bar" if row.among is None else "@rank-6" for row in rows]
    bars: Trace = {
        "type": "bar",
        "orientation": "h",
        "x": [row.share for row in rows],
        "y": [label(name) for name in names],
        "marker": {"color": marks},
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [row.high - row.share for row in rows],
            "arrayminus": [row.share - row.low for row in rows],
            "color": "@ink-2",
            "thickness": 1.2,
            "width": 4,
        },
        "hovertemplate": "%{y}: %{x:.0%}<extra></extra>",
        "cliponaxis": False,
    }
    return figure(
        [bars],
        max(130, 56 + 38 * len(rows)),
        bargap=0.45,
        xaxis=axis(range=[0, 1.02], tickformat=".0%", dtick=0.25, fixedrange=True),
        yaxis=axis(showgrid=False, fixedrange=True, type="category", ticksuffix="  "),
        margin={"l": 16, "r": 16, "t": 4, "b": 32},
    )
