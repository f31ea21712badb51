"""A sweep tracked against untracked, and what tracking costs each trial.

Both sides run the same training under Ray Tune on one cluster: ours with this package and three backends, the other a
plain `ray.tune.run` without loggers that uses its processes again, as ours does. Trials of twenty seconds, two at a
time, each logging two numbers a step, as the digits example does (what logging more costs is P2's); sweeps of both
sides take turns, and the n-th of one is held against the n-th of the other. The time is the caller's, from the call to
the result: start of the hub, of the backends and their last delivery are in it. Those are about 3 s of two cores
whatever the length of the sweep, most of it the imports of MLflow and W&B: a sweep shorter than a minute pays more
than the goal. All tracked sweeps share a storage and MLflow's database in it, made by the first one, which is not
counted.
The cost of a trial is what it adds to the way from one trial's training to the next one's, when trials of about a
second run one at a time: from the last step of one to the first line of the next there are its last report, its end in
the tracker, Tune's own turn, and the next one's beginning in the tracker. Gap by gap, ours less plain. (Trials of no
length at all would measure how long the tracker takes for one on its own time, too, which then is still busy with
those before: 0.05 to 0.06 s.) What a trial
would cost that opened W&B and MLflow itself, in the process that Tune gives it, stands beside it, with its imports and
an MLflow database that is there already.
"""

from __future__ import annotations

import os
import statistics
from dataclasses import replace
from pathlib import Path

from tests.bench.measures import Measurement, Setup, Side, at_most, difference, ratio
from tests.bench.report import quantity
from tests.bench.sweep_jobs import Sweep, direct, run_tracked, run_untracked, turnarounds

_ROUNDS, _QUICK_ROUNDS = 3, 1
_TRIALS, _EPOCHS, _STEPS = 12, 4, 750
_QUICK_TRIALS = 4
_SHORT_TRIALS, _SHORT_STEPS = 11, 200
_DIRECT = 3


def measure(setup: Setup) -> list[Measurement]:
    import ray

    import ray_tracking.runtime.cluster  # noqa: F401  its settings of Ray are for both
    from ray_tracking.runtime.console import quieten

    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    quieten()
    tracked: list[float] = []
    plain: list[float] = []
    gaps: tuple[list[float], list[float]] = [], []
    try:
        _pair(setup.folder, "first", 2, 2, 1, 10)  # what a cluster does only once
        for number in range(_QUICK_ROUNDS if setup.quick else _ROUNDS):
            trials = _QUICK_TRIALS if setup.quick else _TRIALS
            ours, base = _pair(setup.folder, f"long-{number}", trials, 2, _EPOCHS, _STEPS, turned=number % 2 == 1)
            tracked.append(ours)
            plain.append(base)
            short = f"short-{number}"
            _pair(setup.folder, short, _SHORT_TRIALS, 1, 1, _SHORT_STEPS, turned=number % 2 == 1)
            for side, found in zip(("tracked", "plain"), gaps, strict=True):
                found += turnarounds(_sweep(setup.folder, short, side, _SHORT_TRIALS, 1, 1, _SHORT_STEPS))
        direct(setup.folder / "direct")  # makes the database
        opened = [direct(setup.folder / "direct") for _ in range(_DIRECT)]
    finally:
        ray.shutdown()
    return measurements(tracked, plain, *gaps, opened)


def measurements(
    tracked: list[float], plain: list[float], ours: list[float], base: list[float], opened: list[float]
) -> list[Measurement]:
    """Pure. `ours` and `base`: seconds between trials; `opened`: of opening W&B and MLflow in each trial."""
    sweeps = ratio(
        "P6", "a sweep, against untracked", "s", Side("tracked", tuple(tracked)), Side("ray.tune.run", tuple(plain)),
        at_most(1.05),
    )  # fmt: skip
    between = difference(
        "P6", "tracking of a trial, on the way to the next", "s", Side("tracked", tuple(ours)),
        Side("ray.tune.run", tuple(base)), at_most(0.05),
    )  # fmt: skip
    worst = quantity(max(mine - other for mine, other in zip(ours, base, strict=True)), "s")
    directly = statistics.median(opened)
    note = (
        f"the longest {worst}. A trial that opens and ends W&B and MLflow itself takes {quantity(directly, 's')}, "
        f"{quantity(directly / max(between.result, 0.001), 'x')} as long."
    )
    return [sweeps, replace(between, note=note)]


def _pair(
    folder: Path, name: str, trials: int, at_once: int, epochs: int, steps: int, *, turned: bool = False
) -> tuple[float, float]:
    """A sweep of each side: (tracked, plain) seconds."""
    seconds = {}
    for side in ("plain", "tracked") if turned else ("tracked", "plain"):
        sweep = _sweep(folder, name, side, trials, at_once, epochs, steps)
        Path(sweep.folder).mkdir(parents=True)
        seconds[side] = run_tracked(sweep) if side == "tracked" else run_untracked(sweep)
    return seconds["tracked"], seconds["plain"]


def _sweep(folder: Path, name: str, side: str, trials: int, at_once: int, epochs: int, steps: int) -> Sweep:
    return Sweep(str(folder / f"{name}-{side}"), trials, at_once, epochs, steps)
