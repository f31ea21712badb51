"""The tables of a sweep's page: its trials, and how it was searched. In: `SweepFacts`. Out: sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray_tracking.monitoring.report.figures import colour
from ray_tracking.monitoring.report.page import Cell, Markup, facts, join, section, table, tag, text
from ray_tracking.monitoring.report.params import flat
from ray_tracking.monitoring.report.sweep_facts import SweepFacts, TrialFacts
from ray_tracking.monitoring.wording import duration, number, value


def trials_table(sweep: SweepFacts) -> Markup:
    """All of them, best first."""
    names = [axis.name for axis in sweep.axes]
    numeric = {name for name in names if all(_is_number(t.params[name]) for t in sweep.trials if name in t.params)}
    metric = sweep.view.metric
    columns = [
        ("trial", False), (metric, True), ("status", False), *((name, name in numeric) for name in names),
        ("steps", True), ("took", True), ("run", False),
    ]  # fmt: skip
    ranked = sorted(sweep.trials, key=lambda trial: (trial.rank is None, trial.rank or 0, trial.number))
    rows = [(str(trial.number), _cells(sweep, trial, names)) for trial in ranked]
    return section(
        "Trials",
        table(columns, rows, sortable=True),
        note=text("Best first. A heading sorts; a click on a row keeps its trial marked in the charts."),
        class_="long",
    )


def _cells(sweep: SweepFacts, trial: TrialFacts, names: Sequence[str]) -> list[Cell]:
    dot = tag("i", class_="dot", style=f"color:var(--{colour(trial.rank, sweep.ranked)[1:]})")
    reason = [tag("span", text(told), class_="reason")] if (told := reason_of(trial)) else []
    cells = [
        Cell(join([dot, text(trial.number)]), trial.number),
        Cell(text(number(trial.value)), trial.value),
        Cell(join([tag("span", text(trial.status), class_=trial.status), *reason]), trial.status),
    ]
    for name in names:
        if name in trial.params:
            given = trial.params[name]
            cells.append(Cell(text(value(given)), given if _is_number(given) else value(given)))
        else:
            cells.append(Cell(text("–"), None))
    return [
        *cells,
        Cell(text(trial.steps), trial.steps),
        Cell(text("–" if trial.seconds is None else duration(trial.seconds)), trial.seconds),
        Cell(tag("code", text(trial.run_id)), trial.number),
    ]


def reason_of(trial: TrialFacts) -> str:
    """What its status leaves unsaid."""
    told = (trial.reason or "").removeprefix(trial.status).lstrip(" :,")
    taken = f"went on from {', '.join(trial.takeovers)}" if trial.takeovers else ""
    return "; ".join(part for part in (told, taken) if part)


def _is_number(given: object) -> bool:
    return isinstance(given, int | float) and not isinstance(given, bool)


def search_sections(sweep: SweepFacts) -> Markup:
    """The searcher and its settings, the space and the points tried first."""
    search = sweep.search
    asked = {
        key: given
        for key, given in search.items()
        if given not in (None, [], {}, ()) and key not in ("space", "points", "metric", "mode")
    }
    plain = [(key.replace("_", " "), text(_plain(given))) for key, given in asked.items() if _plain(given)]
    space = [(name, code(_spread(given))) for name, given in (search.get("space") or {}).items()]
    points = [(f"point {index}", code(_point(point))) for index, point in enumerate(search.get("points") or (), 1)]
    metric = ("metric", text(f"{sweep.view.metric}, {sweep.view.mode} is best"))
    return join(
        [
            section("How it was searched", facts([metric, *plain]), class_="half"),
            section("The space, and points tried first", facts([*space, *points]), class_="half"),
        ]
    )


def _spread(given: Any) -> str:
    """`{loguniform: [1e-5, 1e-1]}` as `loguniform 1e-05, 0.1`."""
    if isinstance(given, Mapping) and len(given) == 1:
        [(kind, arguments)] = given.items()
        if isinstance(arguments, list | tuple):
            return f"{kind} {', '.join(value(argument) for argument in arguments)}"
    return value(given)


def _point(point: Any) -> str:
    return ", ".join(f"{name} {value(given)}" for name, given in flat(point).items())


def _plain(given: Any) -> str:
    """`{name: asha, grace_reports: 2}` as `asha, grace reports 2`."""
    if not isinstance(given, Mapping):
        return value(given)
    rest = [
        f"{key.replace('_', ' ')} {value(item)}"
        for key, item in given.items()
        if key != "name" and item not in (None, [], {}, 0.0)
    ]
    return ", ".join([*([str(given["name"])] if "name" in given else []), *rest])


def code(of: str) -> Markup:
    """Text to be copied."""
    return tag("code", text(of))
