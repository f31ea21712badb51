"""P2 on the workers: windows of training with tracking and without, measured by rank 0."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.bench.direct import Direct
from tests.bench.machine import child_named, machine_cpu, tree, tree_cpu
from tests.bench.workload import KEYS

_WARM_UP_SECONDS = 6.0
"""Longer than delivery lags: from then on the backends work at the pace of the logging."""
_DELIVERY_SECONDS = 120.0
_DIRECT_STEPS, _DIRECT_PAUSE = 100, 0.012
_MOST_TRIES = 1.25

Log = Callable[[dict[str, Any]], None]


def nothing(metrics: dict[str, Any]) -> None:
    """The other side of `log_metrics`."""


@dataclass(frozen=True, slots=True)
class Window:
    """`steps` took `seconds`. `foreign`: CPU seconds, in that time, of what is not this benchmark."""

    steps: int
    seconds: float
    foreign: float


class Windows:
    """Takes the windows: silent, tracked, silent, tracked ... silent. All ranks walk through it alike.

    `steps(count, log)` trains. What rank 0 measured goes to the file `params["found"]`:
    `{"records": logged in all, "blocks": [{"rounds": [{"before": Window, "tracked": Window, "after": Window}],
    "cpu": seconds of the tracker and the sender, "records": logged, "direct": {"cpu": ..., "records": ...}}]}`,
    the silent window after one round being the one before the next.
    """

    def __init__(
        self, run: Any, steps: Callable[[int, Log], None], disturbed: Callable[[dict[str, Any]], bool]
    ) -> None:
        self._run = run
        self._params = run.params
        self._steps = steps
        self._disturbed = disturbed
        self._is_first = run.rank == 0
        self._tracker = child_named(os.getppid(), "ray::TrackerActor") if self._is_first else 0
        self._logged = 0

    def measure(self) -> None:
        direct = Direct(Path(self._params["direct"])) if self._is_first else None
        if direct is not None:
            direct.block(5, _DIRECT_PAUSE)
        self._pace = self._steps_per_second()
        self._log(int(_WARM_UP_SECONDS * self._pace))  # opens the backends
        self._deliver()
        self._log(int(_WARM_UP_SECONDS * self._pace))
        blocks = [self._block(direct) for _ in range(self._params["blocks"])]
        self._deliver()
        if direct is not None:
            direct.close()
            Path(self._params["found"]).write_text(json.dumps({"records": self._logged, "blocks": blocks}))
        self._together(None)

    def _block(self, direct: Direct | None) -> dict[str, Any]:
        """So many undisturbed rounds, or as many as may be tried; then one block of direct calls."""
        wanted, rounds = self._params["rounds"], list[dict[str, Any]]()
        logged, cpu = self._logged, self._cpu()
        with self._frozen():
            silent = self._window(nothing)
        while self._together(
            sum(not self._disturbed(row) for row in rounds) < wanted and len(rounds) < _MOST_TRIES * wanted
        ):
            tracked = self._window(self._run.log_metrics)
            with self._frozen():
                after = self._window(nothing)
            rounds.append({"before": asdict(silent), "tracked": asdict(tracked), "after": asdict(after)})
            silent = after
        used = {"cpu": self._cpu() - cpu, "records": self._logged - logged}
        with self._frozen():
            return {"rounds": rounds, **used, "direct": self._direct(direct)}

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """While it lasts, the tracker's processes are stopped: training is as if there were no tracker."""
        members = sorted(tree(self._tracker)) if self._is_first else []
        try:
            for pid in members:
                os.kill(pid, signal.SIGSTOP)
            yield
        finally:
            for pid in members:
                os.kill(pid, signal.SIGCONT)

    def _steps_per_second(self) -> float:
        """The same number on all ranks, as rank 0 found it."""
        self._steps(40, nothing)
        begin = time.perf_counter()
        self._steps(60, nothing)
        return float(self._together(60 / (time.perf_counter() - begin)))

    def _log(self, steps: int) -> None:
        self._steps(steps, self._run.log_metrics)
        self._logged += steps * len(KEYS)

    def _window(self, log: Log) -> Window:
        steps = int(self._params["window"] * self._pace)
        self._together(None)
        foreign, begin = self._foreign(), time.perf_counter()
        if log is nothing:
            self._steps(steps, log)
        else:
            self._log(steps)
        self._together(None)
        seconds = time.perf_counter() - begin
        return Window(steps, seconds, self._foreign() - foreign)

    def _deliver(self) -> None:
        """Wait until the backends have everything."""
        if self._is_first:
            sender = self._run.tracker._sender
            if not (sender.flush(_DELIVERY_SECONDS) and sender._transport.call("wait_delivered", _DELIVERY_SECONDS)):
                raise RuntimeError(f"the backends did not take the records within {_DELIVERY_SECONDS:.0f} s")
        self._together(None)

    def _direct(self, direct: Direct | None) -> dict[str, Any]:
        """A block of direct calls in their own process, while the workers train as they do in the windows."""
        with ThreadPoolExecutor(1) as beside:
            block = beside.submit(direct.block, _DIRECT_STEPS, _DIRECT_PAUSE) if direct is not None else None
            while self._together(block is not None and not block.done()):
                self._steps(int(0.2 * self._pace), nothing)
            return {**block.result(), "records": _DIRECT_STEPS * len(KEYS)} if block is not None else {}

    def _together(self, value: Any) -> Any:
        """Wait for the other ranks; everyone gets rank 0's value."""
        from ray_tracking.runtime.collective import broadcast

        return broadcast(value)

    def _foreign(self) -> float:
        """CPU seconds so far of everything on the machine but this benchmark, stolen ones included; on rank 0."""
        return machine_cpu() - tree_cpu(self._params["driver"]) if self._is_first else 0.0

    def _cpu(self) -> float:
        """CPU seconds so far: the tracker's process with its children, and the sender's threads in this one."""
        if not self._is_first:
            return 0.0
        threads = [thread for thread in threading.enumerate() if thread.name.startswith("ray-tracking-")]
        clocks = [time.pthread_getcpuclockid(thread.ident) for thread in threads if thread.ident]
        return tree_cpu(self._tracker) + sum(time.clock_gettime(clock) for clock in clocks)
