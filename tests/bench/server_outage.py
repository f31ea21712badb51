"""Training speed while MLflow's server is up, gone, and back again: what a training loop feels of an outage.

Not one of the figures: run by hand as `python -m tests.bench.server_outage [--rounds N] [--seconds S]`.
One loop on one core, which it keeps busy, and one run, tracked by a child process as in a script. In each round the
windows come in this order: up, gone, back (what came meanwhile is filled from the journal), and up again; `gone` and
`back` are held against the mean of the `up` before and after. The server has the last core to itself and the tracker,
since it stands for one on another machine. In the end its history is compared with the journal.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.bench import report
from tests.bench.machine import isolate, machine
from tests.bench.measures import Measurement, Side, absolute, at_least, at_most, percentile, ratio
from tests.bench.workload import metrics_of

_WARM_UP_SECONDS = 3.0
"""Longer than delivery's pause: its work is spread over the window from then on."""
_STATE_SECONDS = 180.0
_GOAL = 0.98
_CORES = sorted(os.sched_getaffinity(0))
_P99_SECONDS = 0.001


@dataclass(frozen=True, slots=True)
class Window:
    """`speed` in steps/s; `p99` of `log_metrics`, in seconds."""

    speed: float
    p99: float


class Loop:
    """About a hundred steps a second, ten scalars each."""

    def __init__(self, tracker: Any, seconds: float) -> None:
        import torch

        torch.set_num_threads(1)
        self._torch = torch
        self._model = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 10))
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=0.01)
        self._x, self._y = torch.randn(256, 256), torch.randint(0, 10, (256,))
        self._tracker = tracker
        self._seconds = seconds
        self.step = 0

    def train(self) -> float:
        """One step; returns the seconds that `log_metrics` took."""
        loss = self._torch.nn.functional.cross_entropy(self._model(self._x), self._y)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self.step += 1
        metrics = metrics_of(self.step)
        began = time.perf_counter()
        self._tracker.log_metrics(metrics, step=self.step)
        return time.perf_counter() - began

    def until(self, condition: Callable[[], bool]) -> None:
        """Train until it holds, and at least as long as a warm-up takes."""
        begin = time.monotonic()
        while time.monotonic() - begin < _WARM_UP_SECONDS:
            self.train()
        while not condition():
            if time.monotonic() - begin > _STATE_SECONDS:
                raise RuntimeError(f"it did not come to that within {_STATE_SECONDS:.0f} s")
            for _ in range(20):
                self.train()

    def window(self) -> Window:
        waits = []
        begin = time.perf_counter()
        while time.perf_counter() - begin < self._seconds:
            waits.append(self.train())
        speed = len(waits) / (time.perf_counter() - begin)
        return Window(speed, percentile(waits, 99))


def measure(folder: Path, rounds: int, seconds: float) -> list[Measurement]:
    from ray_tracking.testing.chaos.server import MLflowServer
    from ray_tracking.tracking.composite import CompositeTracker

    (folder / "server").mkdir()
    server = MLflowServer(folder / "server")
    start(server)
    others = {name: {"enabled": False} for name in ("tensorboard", "wandb")}
    delivery = {"final_secs": _STATE_SECONDS}
    config = {**others, "mlflow": {"enabled": True, "tracking_uri": server.uri}, "delivery": delivery}
    tracker = CompositeTracker(config, storage=str(folder / "runs"))
    run_id = tracker.init_experiment("outage")

    def state() -> str:
        return str(tracker._transport.call("status")["backends"]["mlflow"])  # type: ignore[union-attr]

    os.sched_setaffinity(0, {_CORES[0]})  # of this thread, and those it starts from now on
    loop = Loop(tracker, seconds)
    windows: dict[str, list[Window]] = {"up": [], "gone": [], "back": []}
    try:
        loop.until(lambda: state() == "ok")
        windows["up"].append(loop.window())
        for _ in range(rounds):
            server.kill()
            loop.until(lambda: state() == "failing")
            windows["gone"].append(loop.window())
            start(server)
            loop.until(lambda: state() == "ok")
            windows["back"].append(loop.window())
            loop.until(lambda: bool(tracker._transport.call("wait_delivered", 60.0)))  # type: ignore[union-attr]
            windows["up"].append(loop.window())
        tracker.finalize_experiment()
        missing = _missing(folder / "runs", run_id, server.uri)
    finally:
        server.kill()
    return [
        *(_speed(what, windows[what], windows["up"]) for what in ("gone", "back")),
        *(_p99(what, found) for what, found in windows.items()),
        absolute("outage", "points lost or doubled in MLflow", "", missing, at_most(0.0)),
    ]


def start(server: Any) -> None:
    """On the last core: its work is another machine's, in the world this stands for."""
    ours = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {_CORES[-1]})
    try:
        server.start()
    finally:
        os.sched_setaffinity(0, ours)


def _speed(what: str, windows: list[Window], up: list[Window]) -> Measurement:
    around = [statistics.mean((before.speed, after.speed)) for before, after in pairwise(up)]
    ours = Side(f"server {what}", tuple(window.speed for window in windows))
    title = f"training speed, server {what} against up"
    return ratio("outage", title, "steps/s", ours, Side("server up", tuple(around)), at_least(_GOAL))


def _p99(what: str, windows: list[Window]) -> Measurement:
    side = Side(f"server {what}", tuple(window.p99 for window in windows))
    return absolute("outage", f"log_metrics p99, server {what}", "s", side, at_most(_P99_SECONDS))


def _missing(storage: Path, run_id: str, uri: str) -> Side:
    from ray_tracking.journal.reader import JournalReader
    from ray_tracking.storage import Storage
    from ray_tracking.testing.readback import comparable, mlflow_points
    from ray_tracking.tracking.cursor import Cursor

    run = Storage.open(storage).child(run_id)
    table = JournalReader(run).effective()
    points = zip(*(table[name].to_pylist() for name in ("key", "step", "value")), strict=True)
    logged = Counter(comparable(points))
    shown = Counter(comparable(mlflow_points(uri, Cursor.load(run, "mlflow").run_id or "")))
    return Side("differences", (float((logged - shown).total() + (shown - logged).total()),))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each window")
    arguments = parser.parse_args()
    if len(_CORES) < 2:
        parser.error("the server needs a core of its own beside the loop's")
    here = machine()
    print(f"{here['processor']}, {here['cores']} cores, load {here['load_average']}")
    with tempfile.TemporaryDirectory(prefix="bench-outage-") as folder:
        isolate(Path(folder) / "home")
        found = measure(Path(folder), arguments.rounds, arguments.seconds)
    print(report.table(found))
    return 0 if all(measurement.is_met for measurement in found) else 1


if __name__ == "__main__":
    sys.exit(main())
