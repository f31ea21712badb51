"""A page from its parts: one HTML file that needs nothing else and may load nothing else. Pure, but for its assets.

In: `Markup` made of escaped text, figures. Out: the document. Its content security policy allows the page's own
scripts, by their digests, and no request at all; data stands in it as JSON that no tag can end.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from html import escape
from importlib import resources
from typing import Any, NamedTuple, NewType

from ray_tracking.extras import require
from ray_tracking.monitoring.report.figures import Figure

Markup = NewType("Markup", str)
"""HTML: what users wrote is escaped in it."""


class Cell(NamedTuple):
    """What a table shows at a place, and what it is sorted by: a number, text, or None, which comes last."""

    shown: Markup
    key: float | str | None


def text(value: object) -> Markup:
    """Anything as text. Control characters stand as `?`."""
    shown = "".join(char if char.isprintable() or char == "\n" else "?" for char in str(value))
    return Markup(escape(shown))


def join(parts: Iterable[Markup]) -> Markup:
    return Markup("".join(parts))


def tag(name: str, *content: Markup, **attributes: str) -> Markup:
    """An element. Attributes are escaped; `class_` is `class`, `data_x` is `data-x`."""
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{given}>{''.join(content)}</{name}>")


def section(title: str, *content: Markup, note: Markup | None = None, **attributes: str) -> Markup:
    """A card with a heading and, below it, how it is to be read."""
    head = tag("h2", text(title))
    told = [tag("p", note, class_="note")] if note else []
    return tag("section", head, *told, *content, **attributes)


def chart(name: str, height: int, described: str) -> Markup:
    """The place of the figure of this name. `described`: what it shows, for those who can't see it."""
    return tag(
        "div", id=f"chart-{name}", class_="chart", data_chart=name, role="img", aria_label=described,
        style=f"height:{height}px",
    )  # fmt: skip


def facts(pairs: Iterable[tuple[str, Markup | None]]) -> Markup:
    """Names and values below each other; those that are None are left out."""
    rows = [
        tag("div", tag("dt", text(name)), tag("dd", value))
        for name, value in pairs
        if value is not None and value != ""
    ]
    return tag("dl", *rows, class_="facts")


def table(
    columns: Iterable[tuple[str, bool]], rows: Iterable[tuple[str | None, Iterable[Cell]]], *, sortable: bool
) -> Markup:
    """`columns`: title and whether numbers stand in it. `rows`: the trial that a row is of, and its cells."""
    listed = list(columns)
    heads = [
        tag(
            "th",
            tag("button", text(title), type="button") if sortable else text(title),
            scope="col",
            **({"class_": "number"} if numeric else {}),
        )
        for title, numeric in listed
    ]
    body = []
    for trial, cells in rows:
        drawn = [
            tag(
                "td",
                cell.shown,
                **({"class_": "number"} if numeric else {}),
                **({} if cell.key is None else {"data_key": str(cell.key)}),
            )
            for cell, (_, numeric) in zip(cells, listed, strict=True)
        ]
        body.append(tag("tr", *drawn, **({} if trial is None else {"data_trial": trial})))
    drawn_table = tag(
        "table", tag("thead", tag("tr", *heads)), tag("tbody", *body), **({"class_": "sortable"} if sortable else {})
    )
    return tag("div", drawn_table, class_="scroll", tabindex="0")


def document(title: str, body: Iterable[Markup], figures: Mapping[str, Any], more: Mapping[str, Any]) -> str:
    """The whole page. `figures`: by chart; one with `variants` holds several, among which the page's
    reader chooses.

    Raises MissingExtraError without plotly.
    """
    require("report", "plotly")
    from plotly.offline import get_plotlyjs

    scripts = [get_plotlyjs(), _asset("report.js")]
    digests = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    policy = (
        f"default-src 'none'; script-src {digests}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    data = json_for_html({"figures": figures, **more})
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            '<meta name="generator" content="ray-tracking report">',
            '<meta name="referrer" content="no-referrer">',
            '<link rel="icon" href="data:,">',
            f"<title>{text(title)}</title>",
            f"<style>{_asset('report.css')}</style>",
            "</head>",
            "<body>",
            f"<main>{join(body)}</main>",
            f'<script type="application/json" id="data">{data}</script>',
            *(f"<script>{script}</script>" for script in scripts),
            "</body>",
            "</html>",
            "",
        ]
    )


def json_for_html(value: Any) -> str:
    """JSON in which no `<`, `>` or `&` stands, so that nothing in it can end its element."""
    found = json.dumps(value, allow_nan=False, ensure_ascii=True, separators=(",", ":"), default=_as_figure)
    return found.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _as_figure(value: Any) -> Figure:
    raise TypeError(f"{type(value).__name__} is no part of a figure")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath("assets", name).read_text(encoding="utf-8")
