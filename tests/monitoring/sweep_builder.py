"""A sweep as it lies on storage, made without Ray: twelve trials that differ as trials do."""

from __future__ import annotations

import math
from typing import Any

from ray_tracking.records import Kind, Record
from ray_tracking.runs.store import RunStore
from ray_tracking.runs.sweep import SweepStore, TrialRecord, TrialStatus
from tests.monitoring.builder import RunBuilder

SPACE: dict[str, Any] = {
    "lr": {"loguniform": [1e-4, 1e-1]},
    "width": {"choice": [16, 32, 64]},
    "optimizer": {"choice": [{"kind": "adam"}, {"kind": "sgd", "momentum": {"uniform": [0.0, 0.9]}}]},
    "epochs": 8,
}
STARTED = 1_700_000_000.0
FAILED, LOST, STOPPED = 5, 9, 7
BEST = 8
"""lr 1e-2 is the best there is."""


def a_sweep(store: RunStore, name: str = "s", trials: int = 12, *, space: dict[str, Any] | None = None) -> SweepStore:
    """Trial 5 fails with a value, 9 without one, 7 is stopped; each other trial reports val/loss eight times."""
    RunBuilder(store, name, entrypoint="train.py:train").finish()
    sweep = SweepStore(store, name)
    search = {
        "metric": "val/loss", "mode": "min", "num_samples": trials, "searcher": {"name": "random", "options": {}},
        "space": SPACE if space is None else space, "points": [params_of(1)],
    }  # fmt: skip
    sweep.create("val/loss", "min", {"name": name, "params": {}, "sweep": search})
    for number in range(1, trials + 1):
        a_trial(sweep, number, params_of(number))
    return sweep


def params_of(number: int) -> dict[str, Any]:
    lr = 10 ** (-4 + 3 * ((number * 7) % 12) / 12)
    optimizer = {"kind": "adam"} if number % 2 else {"kind": "sgd", "momentum": 0.07 * number}
    return {"lr": lr, "width": (16, 32, 64)[number % 3], "optimizer": optimizer, "epochs": 8}


def a_trial(sweep: SweepStore, number: int, params: dict[str, Any]) -> None:
    status, reason, reports = TrialStatus.COMPLETED, "completed", 8
    if number in (FAILED, LOST):
        status, reason, reports = TrialStatus.FAILED, "ValueError: no luck", 3 if number == FAILED else 0
    elif number == STOPPED:
        status, reason, reports = TrialStatus.STOPPED, "stopped by asha after 2 reports", 2
    base = 0.1 + (math.log10(params["lr"]) + 2) ** 2
    records, values = [], []
    for report in range(1, reports + 1):
        value = base + 1 / report
        values.append(value)
        step, when = 10 * report, STARTED + 60 * report
        records.append(Record(Kind.SCALAR, "val/loss", step, when, value, None, 0, 1, report))
        records.append(Record(Kind.SCALAR, "train/loss", step, when, value / 2, None, 0, 1, report))
    run = RunBuilder(sweep.runs, sweep.run_id(number))
    if records:
        run.log(records)
    run.checkpoint(10 * max(reports, 1), {"val/loss": min(values, default=9.0)})
    run.finish()
    sweep.save(
        TrialRecord(
            number, params, status, reason, value=min(values, default=None),
            started=STARTED, ended=STARTED + 30 * number,
        )
    )  # fmt: skip
