"""P2 on the workers: windows of training with and without logging, measured by rank 0."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.bench.direct import Direct
from tests.bench.machine import child_named, machine_cpu, tree_cpu
from tests.bench.workload import KEYS

_SILENT_WARM_UP_SECONDS = 0.4
_TRACKED_WARM_UP_SECONDS = 4.0
"""Longer than delivery lags: from then on the backends work at the pace of the logging."""
_SETTLE_SECONDS = 0.5
_DELIVERY_SECONDS = 120.0
_DIRECT_STEPS, _DIRECT_PAUSE = 100, 0.012
_DIRECT_EVERY = 4
_MOST_TRIES = 1.25

Log = Callable[[dict[str, Any]], None]


def nothing(metrics: dict[str, Any]) -> None:
    """The other side of `log_metrics`."""


@dataclass(frozen=True, slots=True)
class Window:
    """`steps` took `seconds`; the rest is of the whole window with its warm-up and the wait for the backends.

    `lag`: seconds until the backends had everything; `records` logged; CPU seconds of the tracker (`cpu`) and of what
    is not this benchmark (`foreign`), in `whole_seconds`.
    """

    steps: int
    seconds: float
    lag: float
    records: int
    cpu: float
    foreign: float
    whole_seconds: float


class Windows:
    """Takes the windows: silent, logging, silent, logging ... silent. All ranks walk through it alike.

    `steps(count, log)` trains. What rank 0 measured goes to the file `params["found"]`: `{"before": records logged
    before the rounds, "rounds": [{"before": Window, "tracked": Window, "after": Window, "direct": ...}]}`, the silent
    window after one round being the one before the next.
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

    def measure(self) -> None:
        direct = Direct(Path(self._params["direct"])) if self._is_first else None
        if direct is not None:
            direct.block(5, _DIRECT_PAUSE)
        self._pace = self._steps_per_second()
        before = self._tracked().records  # opens the backends
        rounds: list[dict[str, Any]] = []
        silent = self._silent()
        while self._together(self._wants_more(rounds)):
            tracked, after = self._tracked(), self._silent()
            row = {"before": asdict(silent), "tracked": asdict(tracked), "after": asdict(after)}
            if len(rounds) % _DIRECT_EVERY == 0:
                row["direct"] = self._direct(direct)
            rounds.append(row)
            silent = after
        if direct is not None:
            direct.close()
            Path(self._params["found"]).write_text(json.dumps({"before": before, "rounds": rounds}))
        self._together(None)

    def _wants_more(self, rounds: list[dict[str, Any]]) -> bool:
        wanted = self._params["rounds"]
        return sum(not self._disturbed(row) for row in rounds) < wanted and len(rounds) < _MOST_TRIES * wanted

    def _steps_per_second(self) -> float:
        """The same number on all ranks, as rank 0 found it."""
        self._steps(40, nothing)
        begin = time.perf_counter()
        self._steps(60, nothing)
        return float(self._together(60 / (time.perf_counter() - begin)))

    def _tracked(self) -> Window:
        return self._window(self._run.log_metrics, _TRACKED_WARM_UP_SECONDS)

    def _silent(self) -> Window:
        return self._window(nothing, _SILENT_WARM_UP_SECONDS)

    def _window(self, log: Log, warm_up_seconds: float) -> Window:
        warm_up, timed = int(warm_up_seconds * self._pace), int(self._params["window"] * self._pace)
        begin, cpu, foreign = time.perf_counter(), self._cpu(), self._foreign()
        self._steps(warm_up, log)
        self._together(None)
        begin_timed = time.perf_counter()
        self._steps(timed, log)
        self._together(None)
        seconds = time.perf_counter() - begin_timed
        lag = self._deliver()
        return Window(
            timed,
            seconds,
            lag,
            (warm_up + timed) * len(KEYS) if log is not nothing else 0,
            self._cpu() - cpu,
            self._foreign() - foreign,
            time.perf_counter() - begin,
        )

    def _deliver(self) -> float:
        """Wait until the backends have everything; returns how long that took, in seconds."""
        begin = time.perf_counter()
        if self._is_first:
            sender = self._run.tracker._sender
            if not (sender.flush(_DELIVERY_SECONDS) and sender._transport.call("wait_delivered", _DELIVERY_SECONDS)):
                raise RuntimeError(f"the backends did not take the records within {_DELIVERY_SECONDS:.0f} s")
        lag = time.perf_counter() - begin
        time.sleep(_SETTLE_SECONDS)  # W&B's own process works on
        self._together(None)
        return lag

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
