"""`log_metrics` of 10 scalars as the loop sees it, against a bare deque append and against direct backend calls.

The tracker is a real one: its pump and courier threads run here, its child process journals and fills three backends.
Blocks take turns, in bursts with pauses, so that the pump works during the calls as it does in training: the p50 is a
call with warm caches, the p99 the first one after a pause, or one that met the pump. After a block of ours everything
is delivered before the next block begins: no work of ours falls into the base's time. The base has a new deque for
each block, so that it never pays for what it drops. Each call is timed by two readings of the clock, which cost some
60 ns and are in both sides, as they were in the 0.2 µs that the design gives for the base.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator

from ray_tracking.tracking.composite import CompositeTracker
from tests.bench.direct import Direct
from tests.bench.measures import Measurement, Setup, Side, at_least, at_most, percentile, ratio, speedup
from tests.bench.workload import THREE_BACKENDS, metrics_of

_BURST = 50
_PAUSE = 0.05
_BURSTS_PER_BLOCK = 20
_ROUNDS, _QUICK_ROUNDS = 15, 3
_DIRECT_CALLS, _DIRECT_PAUSE = 20, 0.01

Times = list[float]


class _Position:
    """The step that the loop is at, as `run` holds it (runtime.context.Position, without importing torch)."""

    def __init__(self) -> None:
        self.step = 0

    @property
    def here(self) -> int:
        return self.step


def measure(setup: Setup) -> list[Measurement]:
    tracker = CompositeTracker(THREE_BACKENDS, storage=str(setup.folder / "runs"))
    tracker.init_experiment("bench")
    direct = Direct(setup.folder / "direct")
    try:
        _deliver(tracker)
        direct.block(5, _DIRECT_PAUSE)
        _round(tracker, direct, 0)  # the first of everything is no measure
        rows = [_round(tracker, direct, i + 1) for i in range(_QUICK_ROUNDS if setup.quick else _ROUNDS)]
    finally:
        direct.close()
        tracker.finalize_experiment()
    return _measurements(rows)


def _round(tracker: CompositeTracker, direct: Direct, number: int) -> dict[str, Times]:
    """One block of each side; another side is the first in every round."""
    assert tracker._sender is not None
    first = number * _BURST * _BURSTS_PER_BLOCK
    position = _Position()
    run_log = tracker._sender.metrics_logger(position)
    blocks: dict[str, Callable[[], Times]] = {
        "bare": lambda: _bare_block(first),
        "run": lambda: _run_block(run_log, position, first),
        "tracker": lambda: _tracker_block(tracker.log_metrics, first),
        "direct": lambda: direct.block(_DIRECT_CALLS, _DIRECT_PAUSE)["seconds"],
    }
    taken = {}
    names = list(blocks)
    turn = number % len(names)
    for name in names[turn:] + names[:turn]:
        taken[name] = blocks[name]()
        if name in ("run", "tracker"):
            _deliver(tracker)
    return taken


def _deliver(tracker: CompositeTracker) -> None:
    assert tracker._transport is not None
    if not (tracker.flush(60.0) and tracker._transport.call("wait_delivered", 60.0)):
        raise RuntimeError("the backends did not take the records within 60 s")


def _steps(first: int) -> Iterator[int]:
    """The steps of a block, with a pause before each burst."""
    for step in range(first, first + _BURSTS_PER_BLOCK * _BURST):
        if step % _BURST == 0:
            time.sleep(_PAUSE)
        yield step


# The three loops below are alike but for the call: a function around the call would cost as much as the base.
# Each makes its metrics right before the call, as a training loop does.


def _run_block(log_metrics: Callable[..., None], position: _Position, first: int) -> Times:
    now, took = time.perf_counter_ns, []
    for step in _steps(first):
        position.step = step
        metrics = metrics_of(step)
        begin = now()
        log_metrics(metrics)
        took.append(now() - begin)
    return _seconds(took)


def _tracker_block(log_metrics: Callable[..., None], first: int) -> Times:
    now, took = time.perf_counter_ns, []
    for step in _steps(first):
        metrics = metrics_of(step)
        begin = now()
        log_metrics(metrics, step=step)
        took.append(now() - begin)
    return _seconds(took)


def _bare_block(first: int) -> Times:
    append = deque[dict[str, float]](maxlen=_BURST * _BURSTS_PER_BLOCK).append
    now, took = time.perf_counter_ns, []
    for step in _steps(first):
        metrics = metrics_of(step)
        begin = now()
        append(dict(metrics))
        took.append(now() - begin)
    return _seconds(took)


def _seconds(nanoseconds: list[int]) -> Times:
    return [value * 1e-9 for value in nanoseconds]


def _measurements(rows: list[dict[str, Times]]) -> list[Measurement]:
    def side(name: str, key: str, percent: float) -> Side:
        return Side(name, tuple(percentile(row[key], percent) for row in rows))

    measurements = []
    for key, name in (("run", "run.log_metrics(metrics)"), ("tracker", "tracker.log_metrics(metrics, step)")):
        for percent, goal in ((50, at_most(3.0)), (99, at_most(5.0))):
            ours, base = side(name, key, percent), side("deque.append(dict(metrics))", "bare", percent)
            measurements.append(ratio("P1", f"{name}, p{percent}, against a deque append", "s", ours, base, goal))
        ours, base = side(name, key, 50), side("TensorBoard + W&B + MLflow", "direct", 50)
        measurements.append(speedup("P1", f"{name}, p50, against direct calls", "s", ours, base, at_least(1000.0)))
    return measurements
