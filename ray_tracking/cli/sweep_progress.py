"""A sweep's progress on the terminal: a live table of its trials, or a plain line when something ends.

In: `SweepProgress` reports, about twice a second from the main thread. Out: text on stderr.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ray_tracking.cli.output import console, duration, number, printable, table

if TYPE_CHECKING:
    from ray_tracking.runs.sweep import TrialRecord
    from ray_tracking.runtime.sweep.result import SweepProgress

_ROWS = 20
"""Trials in the live table, the newest; what is above them is counted."""


def summary(report: SweepProgress) -> str:
    """How far the sweep is, in one line."""
    over = [trial for trial in report.trials if trial.status.is_over]
    running = sum(trial.status.value == "running" for trial in report.trials)
    parts = [f"{len(over)}/{report.total} trials", f"{running} running"]
    failed = sum(trial.status.value == "failed" for trial in over)
    if failed:
        parts.append(f"{failed} failed")
    best = best_so_far(report)
    if best is not None:
        parts.append(f"best {report.metric} {number(best.value)} (trial {best.number})")
    parts.append(duration(report.elapsed))
    if report.left is not None and len(over) < report.total:
        parts.append(f"{duration(report.left)} left")
    return printable("  ".join(parts))


def best_so_far(report: SweepProgress) -> TrialRecord | None:
    """The best trial, those under way among them."""
    from ray_tracking.runs.sweep import best_of

    return best_of(report.trials, report.mode)


def rows(report: SweepProgress) -> list[tuple[object, ...]]:
    """trial, status, step, metric now, best, params; the newest trials last."""
    from ray_tracking.cli.sweep import shown

    found: list[tuple[object, ...]] = []
    for trial in report.trials[-_ROWS:]:
        at = report.standing.get(trial.number, {})
        now = at.get("metrics", {}).get(report.metric)
        found.append(
            (trial.number, trial.status.value, at.get("step"), number(now), number(trial.value), shown(trial.params))
        )
    return found


class SweepProgressView:
    """Shows reports between `with` and its end."""

    def __init__(self, *, live: bool | None = None) -> None:
        self._live_wanted = sys.stderr.isatty() if live is None else live
        self._live: Any = None
        self._last = ""
        self._over = -1

    def __enter__(self) -> SweepProgressView:
        if self._live_wanted:
            from rich.live import Live
            from rich.text import Text

            self._live = Live(Text(""), console=console(stderr=True), refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._last:
            print(self._last, file=sys.stderr, flush=True)  # noqa: T201 - the last state stays on the screen
        self._last = ""

    def report(self, report: SweepProgress) -> None:
        """Show it: the table on a terminal; elsewhere a line whenever a trial has ended."""
        line = summary(report)
        if self._live is not None:
            from rich.console import Group
            from rich.text import Text

            columns = ("trial", "status", "step", "now", "best", "params")
            drawn = table("", columns, rows(report), right=("step", "now", "best"))
            self._live.update(Group(drawn, Text(line)))
            self._last = line
            return
        over = sum(trial.status.is_over for trial in report.trials)
        if over != self._over:
            self._over = over
            print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)  # noqa: T201
