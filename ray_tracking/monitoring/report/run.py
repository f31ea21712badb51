"""The page of one run: `report RUN`. In: a store and a run's id. Out: HTML."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray_tracking.config import redact
from ray_tracking.config.redaction import redact_text
from ray_tracking.monitoring.compare import flatten
from ray_tracking.monitoring.overview import Overview, overview
from ray_tracking.monitoring.report.curves import Curve, Curves, points_for, read_curves
from ray_tracking.monitoring.report.figures import Figure, axis, figure, log_or_linear, numbers
from ray_tracking.monitoring.report.page import Cell, Markup, chart, document, facts, section, table, tag, text
from ray_tracking.monitoring.report.when import moment
from ray_tracking.monitoring.wording import duration, number, size, value
from ray_tracking.runs.store import RunStore

MOST_CHARTS = 24
_HEIGHT = 230


def run_report(runs: RunStore, run_id: str, now: float | None = None) -> str:
    """The page as HTML. Raises as `overview` does; MissingExtraError without plotly."""
    now = time.time() if now is None else now
    view = overview(runs, run_id, now)
    record = runs.load(run_id)
    curves = read_curves(runs.directory(run_id), points_for(1))
    return render(view, curves, redact(dict(record.config)), dict(record.versions), now)


def render(view: Overview, curves: Curves, config: Mapping[str, Any], versions: Mapping[str, str], now: float) -> str:
    """The page of what was read; `config` without secrets."""
    keys = _keys(view, curves)
    resumes = [each.resumed_from_step for each in view.attempts if (each.resumed_from_step or 0) > 0]
    figures = {f"metric-{index}": metric_figure(key, curves.by_key[key], resumes) for index, key in enumerate(keys)}
    parts = [
        _head(view, now),
        _headline(view),
        *_metrics(keys, len(curves.by_key) - len(keys)),
        _attempts(view),
        _checkpoints(view),
        _backends(view),
        _config(config, versions),
        _foot(view, curves, now),
    ]
    return document(f"{view.run_id}: run", parts, figures, {})


def _metrics(keys: Sequence[str], left_out: int) -> list[Markup]:
    """A chart each, two in a row; the last one alone has the row to itself."""
    if not keys:
        return [section("Metrics", tag("p", text("None was logged yet."), class_="empty"))]
    parts = []
    for index, key in enumerate(keys):
        alone = index == len(keys) - 1 and len(keys) % 2
        drawn = chart(f"metric-{index}", _HEIGHT, f"{key} over the steps")
        parts.append(section(key, drawn, class_="" if alone else "half"))
    if left_out:
        told = f"{left_out} more are in the journal: `ray-tracking export` writes all of them to a file."
        parts.append(section("More metrics", tag("p", text(told), class_="empty")))
    return parts


def metric_figure(key: str, curve: Curve, resumes: Sequence[int | None] = ()) -> Figure:
    """One metric over the steps; dotted lines where a later attempt went on."""
    values = numbers(curve.values)
    lone = len(values) < 2
    line = {
        "type": "scatter",
        "mode": "markers" if lone else "lines",
        "x": curve.steps.tolist(),
        "y": values,
        "hovertemplate": "<b>%{y:.5g}</b> at step %{x}<extra></extra>",
        "line": {"color": "@bar", "width": 1.8},
        "marker": {"color": "@bar", "size": 8},
    }
    marks = [
        {
            "type": "line", "x0": step, "x1": step, "yref": "paper", "y0": 0, "y1": 1,
            "line": {"color": "@best", "width": 1, "dash": "dot"},
        }
        for step in resumes
    ]  # fmt: skip
    return figure(
        [line],
        _HEIGHT,
        xaxis=axis("step", showgrid=False, rangemode="tozero"),
        yaxis=axis(**log_or_linear(values)),
        shapes=marks,
        margin={"l": 48, "r": 12, "t": 8, "b": 40},
    )


def _keys(view: Overview, curves: Curves) -> list[str]:
    """The monitor first; what people call validation before the rest."""
    known = sorted(
        curves.by_key, key=lambda key: (key != view.monitor, not key.startswith(("val", "test")), "/" not in key, key)
    )
    return known[:MOST_CHARTS]


def _head(view: Overview, now: float) -> Markup:
    ended = view.ended if view.ended is not None else (now if view.status == "running" else view.alive)
    told = f"Step {view.last_step} in {duration(ended - view.created)}, begun {moment(view.created)}."
    pill = tag("span", text(view.status), class_=f"pill {view.status}")
    return tag("header", tag("h1", text(view.run_id), pill), tag("p", text(told)))


def _headline(view: Overview) -> Markup:
    of = view.metrics.get(view.monitor) if view.monitor else None
    if not of:
        return Markup("")
    best = next((each for each in view.checkpoints if each.best), None)
    latest = max((each.step for each in view.checkpoints if each.complete), default=None)
    can_go_on = view.status not in ("completed", "running")
    resume = tag("code", text(f"ray-tracking resume {view.run_id}"))
    left = tag(
        "div",
        tag("p", text(f"Best {view.monitor}"), class_="what"),
        tag("div", text(number(of["best"])), class_="figure"),
        tag("p", text(f"last {number(of['last'])}"), class_="what"),
    )
    return tag(
        "section",
        left,
        facts(
            [
                ("best kept", text("none" if best is None else f"checkpoint of step {best.step}")),
                ("newest kept", text("none" if latest is None else f"checkpoint of step {latest}")),
                ("function", None if view.entrypoint is None else tag("code", text(redact_text(view.entrypoint)))),
                ("go on", resume if can_go_on else None),
            ]
        ),
        class_="headline",
    )  # fmt: skip


def _attempts(view: Overview) -> Markup:
    rows = [
        (
            None,
            [
                Cell(text(each.number), each.number),
                Cell(text(_from(each.resumed_from_step)), each.resumed_from_step),
                Cell(text(each.world_size), each.world_size),
                Cell(text(duration((each.ended or view.alive) - each.started)), None),
                Cell(text(redact_text(each.reason or "running")), None),
            ],
        )
        for each in view.attempts
    ]
    columns = [("attempt", False), ("from", False), ("workers", True), ("lasted", True), ("ended", False)]
    return section("Attempts", table(columns, rows, sortable=False), class_="half")


def _from(step: int | None) -> str:
    return "unknown" if step is None else "fresh" if step < 0 else f"step {step}"


def _checkpoints(view: Overview) -> Markup:
    if not view.checkpoints:
        return section("Checkpoints", tag("p", text("None is kept."), class_="empty"), class_="half")
    rows = []
    for each in view.checkpoints:
        marks = [
            word
            for word, holds in (("best", each.best), ("pinned", each.pinned), ("incomplete", not each.complete))
            if holds
        ]
        told = ", ".join([*marks, *([each.why] if each.why else [])])
        rows.append(
            (None, [Cell(text(each.step), each.step), Cell(text(size(each.bytes)), each.bytes), Cell(text(told), None)])
        )
    return section(
        "Checkpoints", table([("step", False), ("size", True), ("", False)], rows, sortable=False), class_="half"
    )


def _backends(view: Overview) -> Markup:
    if not view.backends:
        return Markup("")
    rows = [
        (
            None,
            [
                Cell(text(name), None),
                Cell(text(each.state), None),
                Cell(text(each.delivered), None),
                Cell(text(each.pending), None),
                Cell(text(redact_text(each.location or "–")), None),
                Cell(text(redact_text(each.error or "")), None),
            ],
        )
        for name, each in view.backends.items()
    ]
    columns = [
        ("backend", False),
        ("state", False),
        ("delivered", True),
        ("pending", True),
        ("where", False),
        ("", False),
    ]
    return section("Backends", table(columns, rows, sortable=False), note=text("Counted in rows of the journal."))


def _config(config: Mapping[str, Any], versions: Mapping[str, str]) -> Markup:
    rows = [
        (None, [Cell(tag("code", text(key)), key), Cell(tag("code", text(value(given))), None)])
        for key, given in flatten(config).items()
        if given not in (None, {}, [])
    ]
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    return section(
        "Configuration",
        table([("key", False), ("value", False)], rows, sortable=False),
        note=text(f"As resolved, without secrets and what is unset. {told}"),
        class_="long",
    )


def _foot(view: Overview, curves: Curves, now: float) -> Markup:
    lines = [f"Made {moment(now)} from {redact_text(view.path)}.", *view.problems]
    if curves.problem and not view.problems:
        lines.append(redact_text(curves.problem))
    return tag("footer", *(tag("p", text(line)) for line in lines))
