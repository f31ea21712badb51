"""The page of a sweep: `report SWEEP`. In: a store and a sweep's id. Out: HTML."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from ray_tracking.config.redaction import redact_text
from ray_tracking.monitoring.report import sweep_curves, sweep_figures, sweep_params
from ray_tracking.monitoring.report.figures import Figure
from ray_tracking.monitoring.report.page import Markup, chart, document, facts, section, tag, text
from ray_tracking.monitoring.report.sweep_facts import SweepFacts, TrialFacts, sweep_facts
from ray_tracking.monitoring.report.sweep_marks import trial_texts
from ray_tracking.monitoring.report.sweep_table import code, reason_of, search_sections, trials_table
from ray_tracking.monitoring.report.when import moment
from ray_tracking.monitoring.wording import duration, number, value
from ray_tracking.runs.store import RunStore

_ALONG = (("steps", "step"), ("counts", "report"), ("minutes", "minutes"))


def sweep_report(runs: RunStore, sweep_id: str, now: float | None = None) -> str:
    """The page as HTML. Raises as `sweep_view` does; MissingExtraError without plotly."""
    return render(sweep_facts(runs, sweep_id, time.time() if now is None else now), time.time() if now is None else now)


def render(sweep: SweepFacts, now: float) -> str:
    """The page of what was gathered."""
    keys = sweep_curves.curve_keys(sweep)
    drawn: dict[str, Figure | None] = {
        "history": sweep_figures.history(sweep),
        "importance": sweep_figures.shares(sweep.importance),
        "parallel": sweep_params.parallel(sweep),
        "curves": {"variants": {key: sweep_curves.curves(sweep, key) for key in keys}} if keys else None,
        "slices": sweep_params.slices(sweep),
    }
    shown = {name: each for name, each in drawn.items() if each}
    parts = [
        _head(sweep, now),
        _headline(sweep),
        _history(sweep, shown.get("history")),
        _importance(sweep, shown.get("importance")),
        _parallel(sweep, shown.get("parallel")),
        _curves(sweep, keys),
        _slices(sweep, shown.get("slices")),
        trials_table(sweep),
        search_sections(sweep),
        _foot(sweep, now),
    ]
    return document(f"{sweep.view.sweep_id}: sweep", parts, shown, {"trials": trial_texts(sweep)})


def _head(sweep: SweepFacts, now: float) -> Markup:
    view = sweep.view
    by_status: dict[str, int] = {}
    for trial in sweep.trials:
        by_status[trial.status] = by_status.get(trial.status, 0) + 1
    counts = ", ".join(f"{count} {status}" for status, count in by_status.items())
    trials = f"{len(sweep.trials)} trial{'s' * (len(sweep.trials) != 1)}" + (
        f" ({counts})" if len(by_status) > 1 else ""
    )
    took = duration((view.ended or now) - view.created)
    goal = "largest" if view.mode == "max" else "smallest"
    return tag(
        "header",
        tag("h1", text(view.sweep_id), _pill(view.status)),
        tag("p", text(f"Search for the {goal} {view.metric}: {trials} in {took}, begun {moment(view.created)}.")),
    )


def _pill(status: str) -> Markup:
    return tag("span", text(status), class_=f"pill {status}")


def _headline(sweep: SweepFacts) -> Markup:
    best, view = sweep.best, sweep.view
    if best is None or view.best is None:
        return section("Best trial", _empty("No trial has got to a value that counts."))
    left = tag(
        "div",
        tag("p", text(f"Best {view.metric}"), class_="what"),
        tag("div", text(number(best.value)), class_="figure"),
        tag("p", text(f"trial {best.number} of {len(sweep.trials)}"), class_="what"),
        *_against(sweep, best),
    )
    return tag(
        "section",
        left,
        facts(
            [
                ("params", _params(best)),
                ("status", text(f"{best.status} {reason_of(best)}")),
                ("run", code(best.run_id)),
                (
                    "checkpoint",
                    code(f"{best.run_id}/{view.best.checkpoint}") if view.best.checkpoint else text("none kept"),
                ),
                ("look closer", code(f"ray-tracking runs show {best.run_id}")),
            ]
        ),
        class_="headline",
    )


def _against(sweep: SweepFacts, best: TrialFacts) -> Iterator[Markup]:
    default = sweep.default
    if default is None:
        return
    if default.number == best.number:
        yield tag("p", text("The first point, the default, is the best."), class_="against")
    elif default.value is not None and best.value is not None:
        difference = best.value - default.value
        sign = "+" if difference > 0 else "−"
        yield tag(
            "p",
            text(f"The default (trial {default.number}) came to {number(default.value)}: "),
            tag("b", text(f"{sign}{number(abs(difference))}")),
            class_="against",
        )
    else:
        yield tag("p", text(f"The default (trial {default.number}) came to no value."), class_="against")


def _params(trial: TrialFacts) -> Markup:
    if not trial.params:
        return text("none")
    return tag(
        "div",
        *(tag("span", tag("b", text(f"{name} ")), text(value(given))) for name, given in trial.params.items()),
        class_="params",
    )


def _history(sweep: SweepFacts, figure: Any) -> Markup:
    if figure is None:
        return section("History", _empty("No trial has a value yet."), class_="wide")
    ways = [
        ("dot", "completed", "completed"),
        ("dot square", "stopped", "stopped early"),
        ("cross", "failed", "failed"),
        ("dot hollow", "running", "under way"),
    ]
    there = {trial.status for trial in sweep.trials}
    there = {"running" if status in ("pending", "interrupted") else status for status in there}
    legend = tag(
        "ul",
        tag("li", tag("i", class_="dot", style="color:var(--best)"), text("best, and best so far")),
        tag("li", text("2nd"), tag("i", class_="ramp"), text("last")),
        *(
            tag(
                "li",
                tag("i", text("×" if shape == "cross" else ""), class_=shape, style="color:var(--ink-2)"),
                text(name),
            )
            for shape, status, name in ways
            if status in there
        ),
        class_="legend",
    )
    return section(
        "History",
        chart("history", figure["layout"]["height"], f"{sweep.view.metric} of each trial, and the best so far"),
        legend,
        note=text("Each trial's best value. A trial has its colour and mark in all charts of this page."),
        class_="wide",
    )


def _importance(sweep: SweepFacts, figure: Any) -> Markup:
    told = list(sweep.importance.notes)
    if any(trial.takeovers for trial in sweep.trials):
        told.append("Trials changed params while they ran: each is judged by its last.")
    notes = tag("p", text(" ".join(told)), class_="note") if told else Markup("")
    if figure is None:
        return section("What mattered", notes or _empty("No param varies."), class_="narrow")
    return section(
        "What mattered",
        chart("importance", figure["layout"]["height"], "Share of each param in the differences between trials"),
        notes,
        note=text("Each param's share in how the trials rank: functional ANOVA over all trials that did not fail."),
        class_="narrow",
    )


def _parallel(sweep: SweepFacts, figure: Any) -> Markup:
    title = "Params together"
    if figure is None:
        return section(title, _empty("Nothing to draw: no trial has a value, or no param varies."))
    chosen = sweep_params.chosen_axes(sweep)
    varying = len([1 for axis in sweep.axes if axis.name])
    cut = f" Shown are the {len(chosen)} that mattered most." if varying > len(chosen) >= sweep_params.MOST_AXES else ""
    return section(
        title,
        chart("parallel", figure["layout"]["height"], "Parallel coordinates: a line per trial through its params"),
        note=text(
            "A line is a trial, from its params to its value. Drag along an axis to pick trials, here and everywhere; "
            "double-click lets go." + cut
        ),
    )


def _curves(sweep: SweepFacts, keys: Sequence[str]) -> Markup:
    title = "Learning curves"
    if not keys:
        return section(title, _empty("No trial has logged a metric yet."))
    known = {key for curves in sweep.curves.values() for key in curves.by_key}
    cut = f" Of {len(known)} metrics, {len(keys)} can be chosen." if len(known) > len(keys) else ""
    choices = tag(
        "div",
        _select("curves", "key", "metric", [(key, key) for key in keys]),
        _select("curves", "along", "over", _ALONG),
        class_="choices",
    )
    return section(
        title,
        choices,
        chart("curves", 380, "Learning curves of all trials"),
        note=text(
            "From each trial's journal, thinned out but for peaks. The mark at a curve's end says how the trial ended, "
            "as in the history." + cut
        ),
    )


def _select(of: str, what: str, name: str, options: Sequence[tuple[str, str]]) -> Markup:
    listed = [tag("option", text(shown), value=key) for key, shown in options]
    return tag("label", text(f"{name} "), tag("select", *listed, data_of=of, data_what=what))


def _slices(sweep: SweepFacts, figure: Any) -> Markup:
    if figure is None:
        return Markup("")
    return section(
        "Each param by itself",
        chart("slices", figure["layout"]["height"], f"{sweep.view.metric} over each param"),
    )


def _foot(sweep: SweepFacts, now: float) -> Markup:
    lines = [
        f"Made {moment(now)} from {redact_text(sweep.view.path)}"
        + (f", of {sweep.entrypoint}" if sweep.entrypoint else "")
        + "."
    ]
    if sweep.view.status in ("running", "interrupted"):
        lines.append("The sweep was not over then: the page shows what there was.")
    return tag("footer", *(tag("p", text(line)) for line in [*lines, *sweep.problems]))


def _empty(why: str) -> Markup:
    return tag("p", text(why), class_="empty")
