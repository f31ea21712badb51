"""What the figures of a report have in common: figures are plain data, as plotly.js takes it. Pure.

Colours are names ("@ink", "@best", "@rank-3"): the page puts in those of its theme. A point's `customdata` is the
number of its trial, by which the page highlights it everywhere; a trace whose `meta` has `overlay` is where it does.
Everything that a user named goes through `label`: plotly.js reads markup.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

Figure = dict[str, Any]
Trace = dict[str, Any]

RANKS = 10
"""Steps of the colour scale from the best trial to the worst."""
SYMBOLS = {
    "completed": "circle", "stopped": "square", "failed": "x-thin-open", "interrupted": "diamond-open",
    "running": "circle-open", "pending": "circle-open",
}  # fmt: skip
"""How a trial ended, as the marker at its end."""


def label(text: object) -> str:
    """Text that plotly.js shows as it is."""
    shown = "".join(char if char.isprintable() else "?" for char in str(text))
    return escape(shown if len(shown) <= 80 else shown[:79] + "…", quote=False)


def short(text: str, most: int = 18) -> str:
    """For the ticks of an axis."""
    return text if len(text) <= most else text[: most - 1] + "…"


def colour(rank: int | None, ranked: int) -> str:
    """Of a trial: the best stands out, the others fade with their rank, those without a value are grey."""
    if rank is None:
        return "@none"
    if rank == 1:
        return "@best"
    return f"@rank-{min(RANKS - 1, (rank - 1) * RANKS // max(ranked, 1))}"


def number(value: float) -> float | None:
    """JSON has neither NaN nor infinities."""
    return float(value) if math.isfinite(value) else None


def numbers(values: Iterable[float]) -> list[float | None]:
    return [number(value) for value in values]


def axis(title: str | None = None, **more: Any) -> dict[str, Any]:
    """An axis in the page's colours."""
    titled = {} if title is None else {"title": {"text": label(title), "standoff": 10}}
    common = {"gridcolor": "@grid", "linecolor": "@axis", "tickcolor": "@axis", "zeroline": False, "automargin": True}
    return {**common, **titled, **more}


def log_or_linear(values: Iterable[float | None]) -> dict[str, Any]:
    """A logarithmic axis for values above 0 that span more than two decades."""
    found = [value for value in values if value is not None and math.isfinite(value)]
    if not found or min(found) <= 0 or max(found) / min(found) <= 100:
        return {"type": "linear"}
    return {
        "type": "log",
        "exponentformat": "power",
        "tickfont": {"size": 10},
        "dtick": 1 if max(found) / min(found) > 1000 else "D2",
    }


def figure(data: list[Trace], height: int, **layout: Any) -> Figure:
    """In the page's type and colours, on nothing: the page is the background."""
    common: Mapping[str, Any] = {
        "height": height,
        "margin": {"l": 56, "r": 16, "t": 12, "b": 48},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "inherit", "size": 12, "color": "@ink-2"},
        "hoverlabel": {
            "bgcolor": "@card",
            "bordercolor": "@axis",
            "font": {"color": "@ink", "size": 12},
            "align": "left",
        },
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "@none", "activecolor": "@ink"},
        "hovermode": "closest",
        "showlegend": False,
        "dragmode": "zoom",
    }
    return {"data": data, "layout": {**common, **layout}}


def overlay(mode: str, **more: Any) -> Trace:
    """Where the page draws the trials that are pointed at."""
    return {
        "type": "scatter",
        "mode": mode,
        "x": [],
        "y": [],
        "hoverinfo": "skip",
        "meta": {"overlay": True},
        "line": {"color": "@highlight", "width": 3},
        "marker": {"color": "rgba(0,0,0,0)", "size": 15, "line": {"color": "@highlight", "width": 2.5}},
        **more,
    }
