"""The params of a sweep as figures: parallel coordinates, and the value over each param by itself. Pure.

In: `SweepFacts`. Out: figures for plotly.js, None where there is nothing to draw.
"""

from __future__ import annotations

from typing import Any

from ray_tracking.monitoring.report.figures import (
    Figure,
    Trace,
    axis,
    figure,
    label,
    log_or_linear,
    numbers,
    overlay,
    short,
)
from ray_tracking.monitoring.report.params import Axis, number_axis
from ray_tracking.monitoring.report.sweep_facts import SweepFacts
from ray_tracking.monitoring.report.sweep_marks import by_colour, markers

MOST_AXES = 9
_GAP = 0.03
_ROW, _BELOW = 0.65, 0.35
"""Of the height of a row of charts, what is chart, and what is the space below for its labels."""
_ABSENT = -0.13
"""Where a line of the parallel coordinates goes for a param that a trial does not have."""


def chosen_axes(facts: SweepFacts) -> list[Axis]:
    """The axes of the parallel coordinates: all that vary, or of many those that mattered most."""
    varying = [
        axis
        for axis in facts.axes
        if len({repr(t.params[axis.name]) for t in facts.trials if axis.name in t.params}) > 1
    ]
    if len(varying) <= MOST_AXES:
        return varying
    ranks = {row.param: place for place, row in enumerate(facts.importance.shares)}
    kept = sorted(varying, key=lambda each: ranks.get(each.name, len(ranks)))[:MOST_AXES]
    return [each for each in varying if each in kept]


def parallel(facts: SweepFacts) -> Figure | None:
    """A line per trial through its params to its value."""
    chosen = chosen_axes(facts)
    valued = [trial.value for trial in facts.trials if trial.value is not None]
    if not chosen or not valued:
        return None
    last = number_axis(facts.view.metric, valued)
    has_absent = False
    data: list[Trace] = []
    for rank_colour, members in by_colour(facts):
        xs: list[float | None] = []
        ys: list[float | None] = []
        who: list[int | None] = []
        for trial in members:
            places = [each.place(trial.params[each.name]) if each.name in trial.params else _ABSENT for each in chosen]
            places.append(_ABSENT if trial.value is None else last.place(trial.value))
            has_absent = has_absent or _ABSENT in places
            xs += [*range(len(places)), None]
            ys += [*places, None]
            who += [trial.number] * len(places) + [None]
        is_best = rank_colour == "@best"
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": xs,
                "y": ys,
                "customdata": who,
                "hovertemplate": "%{text}<extra></extra>",
                "line": {
                    "color": rank_colour,
                    "width": 3 if is_best else 1.6,
                    **({"dash": "dot"} if rank_colour == "@none" else {}),
                },
                "opacity": 1 if is_best else 0.85,
            }
        )
    data.append(overlay("lines"))
    names = [*(each.name for each in chosen), facts.view.metric]
    return figure(
        data,
        380,
        shapes=[
            {
                "type": "line",
                "x0": at,
                "x1": at,
                "y0": 0,
                "y1": 1,
                "layer": "below",
                "line": {"color": "@axis", "width": 1},
            }
            for at in range(len(names))
        ],
        annotations=[
            note for at, each in enumerate([*chosen, last]) for note in _tick_notes(at, each, last_one=each is last)
        ]
        + ([_note(-0.04, _ABSENT, "none", "right")] if has_absent else []),
        xaxis={
            **axis(range=[-0.35, len(names) - 0.65], showgrid=False, showline=False, side="top", fixedrange=True),
            "tickvals": list(range(len(names))),
            "ticktext": [f"<b>{label(name)}</b>" for name in names],
            "tickfont": {"color": "@ink", "size": 12},
            "ticks": "",
        },
        yaxis={"visible": False, "range": [_ABSENT - 0.05 if has_absent else -0.05, 1.05], "fixedrange": True},
        margin={"l": 24, "r": 24, "t": 36, "b": 8},
        dragmode="select",
        selectdirection="v",
    )


def _tick_notes(at: int, each: Axis, *, last_one: bool) -> list[dict[str, Any]]:
    shift, anchor = (0.02, "left") if last_one else (-0.02, "right")
    return [_note(at + shift, place, text, anchor) for place, text in each.ticks()]


def _note(x: float, y: float, text: str, anchor: str) -> dict[str, Any]:
    return {
        "x": x, "y": y, "text": label(short(text)), "showarrow": False,
        "xanchor": anchor, "yanchor": "middle", "font": {"size": 11, "color": "@ink-2"}, "bgcolor": "@veil",
        "borderpad": 1,
    }  # fmt: skip


def slices(facts: SweepFacts) -> Figure | None:
    """The value over each param by itself, side by side."""
    chosen = chosen_axes(facts)
    valued = [trial for trial in facts.trials if trial.value is not None]
    if not chosen or not valued:
        return None
    columns = min(4 if len(chosen) in (4, 7, 8) else 3, len(chosen))
    rows = -(-len(chosen) // columns)
    scale = log_or_linear(trial.value for trial in valued)
    data: list[Trace] = []
    layout: dict[str, Any] = {}
    for index, each in enumerate(chosen):
        name = "" if index == 0 else str(index + 1)
        having = [trial for trial in valued if each.name in trial.params]
        row, column = divmod(index, columns)
        below = _BELOW / (rows - 1 + _ROW) if rows > 1 else 0.0
        wide, tall = (1 - _GAP * (columns - 1)) / columns, (1 - below * (rows - 1)) / rows
        horizontal = [column * (wide + _GAP), column * (wide + _GAP) + wide]
        vertical = [max(0.0, 1 - row * (tall + below) - tall), 1 - row * (tall + below)]
        on_x: dict[str, Any] = {
            "tickvals": [place for place, _ in each.ticks()],
            "ticktext": [label(short(text)) for _, text in each.ticks()],
            "range": [-0.12, 1.12],
        }
        layout[f"xaxis{name}"] = axis(each.name, domain=horizontal, anchor=f"y{name}", showgrid=False, **on_x)
        layout[f"yaxis{name}"] = axis(
            facts.view.metric if column == 0 else None,
            domain=vertical,
            anchor=f"x{name}",
            **scale,
            **({"matches": "y"} if index else {}),
            **({"showticklabels": False} if column else {}),
        )
        common = {"type": "scatter", "xaxis": f"x{name}", "yaxis": f"y{name}"}
        data.append(
            {
                **common,
                "mode": "markers",
                "x": [each.place(trial.params[each.name]) for trial in having],
                "y": numbers(trial.value for trial in having if trial.value is not None),
                "customdata": [trial.number for trial in having],
                "hovertemplate": "%{text}<extra></extra>",
                "marker": markers(having, facts, 9),
            }
        )
        data.append(overlay("markers", xaxis=f"x{name}", yaxis=f"y{name}"))
    return figure(data, 60 + 210 * rows, **layout)
