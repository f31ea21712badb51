"""How commands print: JSON that every parser takes, and tables that stay readable without colour.

Names come from users, so everything shown goes through `Text`: nothing of it is read as rich markup.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ray_tracking.monitoring.jsontext import plain
from ray_tracking.monitoring.wording import duration, number, size

__all__ = ["cell", "console", "duration", "facts", "number", "print_json", "printable", "size", "table"]

_STYLES = {
    "running": "cyan", "completed": "green", "failed": "red", "aborted": "yellow", "interrupted": "yellow",
    "ok": "green", "complete": "green", "starting": "cyan", "failing": "red", "hanging": "red",
    "disabled": "red", "unavailable": "yellow", "pending": "yellow", "warning": "yellow", "problem": "red",
}  # fmt: skip


def print_json(document: Any) -> None:
    """One JSON document on stdout. Numbers JSON lacks stand as "NaN", "Infinity" and "-Infinity"."""
    sys.stdout.write(json.dumps(plain(document), indent=2, ensure_ascii=False, default=str) + "\n")


def console(*, stderr: bool = False) -> Console:
    """A console on the stream of the moment. Where no terminal says how wide it is, lines are not cut."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, highlight=False, emoji=False, markup=False, soft_wrap=False)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[str] = ()) -> Table:
    """A table whose first column is never cut; columns named in `right` are aligned right."""
    aligned = set(right)
    drawn = Table(title=Text(title, style="bold"), title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        drawn.add_column(
            column,
            justify="right" if column in aligned else "left",
            overflow="fold",
            no_wrap=column in aligned,
            min_width=min(len(column), 12) if index else None,
        )
    for row in rows:
        drawn.add_row(*(cell(value) for value in row))
    return drawn


def cell(value: object) -> Text:
    """A value as text: states in their colour, None as a dash."""
    shown = "-" if value is None else number(value) if isinstance(value, float) else str(value)
    return Text(printable(shown), style=_STYLES.get(shown, ""))


def printable(text: str) -> str:
    """Control characters, a terminal's escape sequences among them, as `?`."""
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text)


def facts(pairs: Iterable[tuple[str, object]]) -> Table:
    """Names and values below each other; those that are None are left out."""
    drawn = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    drawn.add_column(style="bold", no_wrap=True)
    drawn.add_column(overflow="fold")
    for name, value in pairs:
        if value is not None:
            drawn.add_row(cell(name), cell(value))
    return drawn
