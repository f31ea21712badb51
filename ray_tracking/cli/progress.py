"""The progress of a run on the terminal: one live line,
or plain lines every ten seconds where there is no terminal.

In: `Progress` reports, about twice a second from a background thread. Out: text on stderr.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ray_tracking.cli.output import console, duration, number, printable

if TYPE_CHECKING:
    from ray_tracking.runtime.result import Progress

WINDOW_SECONDS = 30.0
"""The rate is that of the last so many seconds: a slow start is soon forgotten,
a single slow step shows little."""
PLAIN_SECONDS = 10.0

Sample = tuple[float, int]
"""(elapsed seconds, step)"""


def remember(samples: Iterable[Sample], new: Sample, window: float = WINDOW_SECONDS) -> list[Sample]:
    """The samples with `new` at the end, without those that the window has left behind.

    The newest sample at or before the window's beginning stays, so that the rate spans the whole window.
    A step below the last one means a new attempt: what was before says nothing any more.
    """
    kept = list(samples)
    if kept and kept[-1][1] > new[1]:
        kept = []
    begin = new[0] - window
    outside = [sample for sample in kept if sample[0] <= begin]
    return [*outside[-1:], *(sample for sample in kept if sample[0] > begin), new]


def rate(samples: Sequence[Sample]) -> float | None:
    """Steps per second over the samples; None until two steps were seen some time apart."""
    if len(samples) < 2:
        return None
    seconds = samples[-1][0] - samples[0][0]
    steps = samples[-1][1] - samples[0][1]
    return steps / seconds if seconds > 0 and steps > 0 else None


def time_left(step: int, total: int | None, per_second: float | None) -> float | None:
    """Seconds until `total` at this rate; None while one of them is unknown."""
    if total is None or not per_second:
        return None
    return max(0, total - step) / per_second


def describe(report: Progress, per_second: float | None) -> str:
    """The progress in one line without markup: what is not known is left out."""
    parts = [report.phase]
    if report.phase != "starting":
        parts.append(f"step {report.step}" + (f"/{report.total_steps}" if report.total_steps else ""))
        if report.total_epochs or report.epoch:
            # epochs are counted from 0 inside, from 1 by people
            shown = min(report.epoch + 1, report.total_epochs or report.epoch + 1)
            parts.append(f"epoch {shown}" + (f"/{report.total_epochs}" if report.total_epochs else ""))
        if per_second is not None:
            parts.append(f"{number(float(f'{per_second:.3g}'))} steps/s")
        if report.loss is not None:
            parts.append(f"{report.loss_key or 'loss'} {number(report.loss)}")
    parts.append(duration(report.elapsed))
    left = time_left(report.step, report.total_steps, per_second) if report.phase == "training" else None
    if left is not None:
        parts.append(f"{duration(left)} left")
    ailing = [f"{name} {state}" for name, state in report.backends.items() if state in _AILING]
    return printable("  ".join([*parts, *ailing]))


_AILING = frozenset({"failing", "hanging", "disabled", "unavailable"})


class ProgressView:
    """Shows reports between `with` and its end. `report` may be called from any thread and never raises
    for a closed view."""

    def __init__(self, *, live: bool | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._live_wanted = sys.stderr.isatty() if live is None else live
        self._clock = clock
        self._lock = threading.Lock()
        self._samples: list[Sample] = []
        self._printed: float | None = None
        self._phase = ""
        self._last = ""
        self._live: Any = None

    def __enter__(self) -> ProgressView:
        if self._live_wanted:
            from rich.live import Live
            from rich.text import Text

            # stdout and stderr are redirected, so that log lines appear above the line, not through it
            self._live = Live(Text(""), console=console(stderr=True), refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            if self._live is not None:
                self._live.stop()
                self._live = None
            if self._last:
                print(self._last, file=sys.stderr, flush=True)  # noqa: T201 - the last state stays on the screen
            self._last = ""
            self._live_wanted = False

    def report(self, report: Progress) -> None:
        """Take in one report."""
        with self._lock:
            # what came before the first step is no part of the rate
            started = report.phase != "starting"
            self._samples = remember(self._samples, (report.elapsed, report.step)) if started else []
            line = describe(report, rate(self._samples))
            if self._live is not None:
                from rich.text import Text

                self._live.update(Text(line, no_wrap=True, overflow="ellipsis"))
                self._last = line
            elif not self._live_wanted:
                self._print_sometimes(line, report.phase)

    def _print_sometimes(self, line: str, phase: str) -> None:
        now = self._clock()
        if phase == self._phase and self._printed is not None and now - self._printed < PLAIN_SECONDS:
            self._last = line
            return
        self._printed, self._phase, self._last = now, phase, ""
        print(line, file=sys.stderr, flush=True)  # noqa: T201 - this is the terminal's text
