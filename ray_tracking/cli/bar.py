"""Progress over bytes or things: a bar on a terminal, a plain line every ten seconds elsewhere. On stderr.

In: how many there will be, and each piece as it is done. Out: text. For one thread.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from ray_tracking.cli.output import console, printable, size

PLAIN_SECONDS = 10.0


class Bar:
    """Shown between `with` and its end, and gone then: what was done is said by others. `unit`: None for bytes."""

    def __init__(
        self,
        title: str,
        total: int,
        *,
        unit: str | None = None,
        live: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title = printable(title)
        self._total = total
        self._unit = unit
        self._live = sys.stderr.isatty() if live is None else live
        self._clock = clock
        self._done = 0
        self._printed = clock()
        self._progress: Any = None
        self._task: Any = None

    def __enter__(self) -> Bar:
        if self._live:
            from rich import progress as parts

            columns = (
                parts.TextColumn("{task.description}"),
                parts.BarColumn(),
                *(
                    (parts.DownloadColumn(), parts.TransferSpeedColumn())
                    if self._unit is None
                    else (parts.MofNCompleteColumn(), parts.TextColumn(self._unit))
                ),
                parts.TimeRemainingColumn(),
            )
            # rich would also send stdout to the terminal, and leave nothing for the file it may be meant for
            self._progress = parts.Progress(
                *columns, console=console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False
            )
            self._task = self._progress.add_task(self._title, total=self._total)
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def say(self, line: str) -> None:
        """A line of the command's output, above the bar where both are on one screen."""
        if self._progress is not None and sys.stdout.isatty():
            from rich.text import Text

            self._progress.console.print(Text(printable(line)), soft_wrap=True)
        else:
            print(printable(line), flush=True)  # noqa: T201

    def advance(self, count: int) -> None:
        """So many more are done."""
        self.reach(self._done + count, self._total)

    def reach(self, done: int, total: int) -> None:
        """So many of so many are done."""
        self._done, self._total = done, total
        if self._progress is not None:
            self._progress.update(self._task, completed=done, total=total)
        elif not self._live and self._clock() - self._printed >= PLAIN_SECONDS:
            self._printed = self._clock()
            share = f" ({100 * self._done // self._total} %)" if self._total else ""
            print(f"{self._title}  {self._shown()}{share}", file=sys.stderr, flush=True)  # noqa: T201

    def _shown(self) -> str:
        if self._unit is None:
            return f"{size(self._done)} of {size(self._total)}"
        return f"{self._done} of {self._total} {self._unit}"
