"""A sweep's progress on the terminal: a live table of its trials, or a plain line when something ends.

In: `SweepProgress` reports, about twice a second from the main thread. Out: text on stderr.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ray_tracking.cli.output import cell, console, duration, number, printable
from ray_tracking.monitoring.compare import flatten
from ray_tracking.monitoring.wording import value

if TYPE_CHECKING:
    from ray_tracking.runs.sweep import TrialRecord
    from ray_tracking.runtime.sweep.result import SweepProgress

_OTHER_LINES = 6
"""Of the terminal, those that are no trial's."""
_MOST_PARAMS = 8


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


def shown_trials(report: SweepProgress, most: int) -> list[TrialRecord]:
    """Those under way, the best, and of the others the newest; by number. Pure."""
    best = best_so_far(report)
    by_weight = sorted(
        report.trials,
        key=lambda trial: (
            trial.status.value != "running",
            best is None or trial.number != best.number,
            -trial.number,
        ),
    )
    return sorted(by_weight[: max(most, 1)], key=lambda trial: trial.number)


def param_columns(trials: Sequence[TrialRecord]) -> dict[str, str]:
    """Dotted name -> heading, of the params that differ between trials: the end of the name that no other has. Pure."""
    flats = [flatten(trial.params) for trial in trials]
    names = dict.fromkeys(name for flat in flats for name in flat)
    differing = [name for name in names if len(flats) < 2 or len({str(flat.get(name)) for flat in flats}) > 1]
    ends = [name.rsplit(".", 1)[-1] for name in differing]
    return {
        name: end if ends.count(end) == 1 else name
        for name, end in list(zip(differing, ends, strict=True))[:_MOST_PARAMS]
    }


def rows(report: SweepProgress, trials: Sequence[TrialRecord], params: Iterable[str]) -> list[tuple[object, ...]]:
    """trial, status, step, metric now, best, then each of `params`."""
    found: list[tuple[object, ...]] = []
    for trial in trials:
        at = report.standing.get(trial.number, {})
        now = at.get("metrics", {}).get(report.metric)
        flat = flatten(trial.params)
        values = [value(flat[name]) if name in flat else None for name in params]
        found.append((trial.number, trial.status.value, at.get("step"), number(now), number(trial.value), *values))
    return found


def drawn(report: SweepProgress, height: int) -> Any:
    """The table for a terminal of so many lines: how far it is on top, a line per trial, the best one bold."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    trials = shown_trials(report, height - _OTHER_LINES)
    params = param_columns(report.trials)
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title, width in (("trial", None), ("status", 11), ("step", None), ("now", 8), ("best", 8)):
        justify: Any = "left" if title == "status" else "right"
        made.add_column(title, justify=justify, no_wrap=True, min_width=width)
    for heading in params.values():
        made.add_column(printable(heading), no_wrap=True, overflow="ellipsis")
    best = best_so_far(report)
    for trial, row in zip(trials, rows(report, trials, params), strict=True):
        is_best = best is not None and trial.number == best.number
        made.add_row(*(cell(each) for each in row), style="bold" if is_best else None)
    hidden = len(report.trials) - len(trials)
    more = [Text(f"and {hidden} more", style="dim")] if hidden else []
    return Group(Text(summary(report)), Text(""), made, *more)


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
            self._live.update(drawn(report, self._live.console.size.height))
            self._last = line
            return
        over = sum(trial.status.is_over for trial in report.trials)
        if over != self._over:
            self._over = over
            print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)  # noqa: T201
