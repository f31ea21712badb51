"""What the work with checkpoints costs as a run collects 100, 1,000 and 10,000 of them.

Each operation is measured whole at each number of checkpoints; the result is the exponent of the power law through
the three: 0 is flat, 1 linear, 2 quadratic. The sides of the table are the cost per checkpoint, at the most and at the
fewest. The checkpoints are complete and tiny: what they cost is listing, manifests and decisions, none of it data.
Each operation is one that has seen none of them before, but for the retention pass after a save: that runs in the
writer process, which has known the older ones since it saved them.
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ray_tracking.checkpoint import CheckpointStore, CheckpointStrategy
from ray_tracking.checkpoint import manifest as names
from ray_tracking.checkpoint.retention import apply_retention
from ray_tracking.checkpoint.state import capture
from ray_tracking.monitoring.overview import checkpoint_views
from ray_tracking.storage import Storage
from tests.bench.measures import Measurement, Setup, Side, at_most
from tests.bench.report import quantity
from tests.bench.state_workload import timed

COUNTS = (100, 1_000, 10_000)
_ROUNDS, _QUICK_ROUNDS = 5, 1
_GOAL = at_most(1.25)
"""Linear, and room for noise and for sorting: n log n fits as 1.13."""
_ATTEMPT = "attempt-001"

LIST = "listing them"
SHOW = "`runs show`: their part of it"
RESUME = "resume: choosing and loading the newest"
FOLDER = "save: its new folder, on the training thread"
KEEP = "retention after a save, all but the oldest kept"
DELETE = "retention that deletes half of them"

Costs = Mapping[str, Mapping[int, Sequence[float]]]
"""Operation -> number of checkpoints -> seconds, one for each round."""


def measure(setup: Setup) -> list[Measurement]:
    costs: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number in range(-1, _QUICK_ROUNDS if setup.quick else _ROUNDS):
        for count in COUNTS if number >= 0 else COUNTS[:1]:  # once before, for imports and caches
            for operation, seconds in _costs(setup.folder / str(count), count).items():
                if number >= 0:
                    costs[operation][count].append(seconds)
    return measurements(costs)


def _costs(folder: Path, count: int) -> dict[str, float]:
    """Seconds for each operation on a new directory with `count` checkpoints."""
    make(folder, count)
    storage = Storage.open(folder)

    def store() -> CheckpointStore:
        return CheckpointStore(storage, _ATTEMPT)

    costs = {
        LIST: timed(lambda: store().checkpoints()),
        SHOW: timed(lambda: checkpoint_views(store().scan(), "loss", "min")),
        RESUME: timed(lambda: store().load_latest()),
        FOLDER: timed(lambda: store().new_folder(count + 1)),
    }
    known = store()
    known.scan()
    costs[KEEP] = timed(lambda: keep(known, count - 1))
    costs[DELETE] = timed(lambda: keep(store(), count // 2))
    shutil.rmtree(folder)
    return costs


def keep(store: CheckpointStore, last: int) -> None:
    """A pass that must leave `last` of them."""
    apply_retention(store, CheckpointStrategy(monitor="loss", keep_last=last))


def make(folder: Path, count: int) -> None:
    """Complete checkpoints of steps 1 to `count`, the newest the best: one is saved, the others are links to its data.

    Saved each for itself, 10,000 of them would take minutes of fsync.
    """
    state = {"model": {"weight": torch.zeros(4)}, "optimizer": {"lr": 0.1}}
    store = CheckpointStore(Storage.open(folder), _ATTEMPT)
    manifest = store.write_snapshot(store.folder_of(count), capture(state, step=count, metrics={"loss": 1.0 / count}))
    first = folder / store.folder_of(count)
    own = names.rank_file(0, 1)
    for step in range(1, count):
        other = folder / store.folder_of(step)
        other.mkdir()
        for name in manifest.files:
            os.link(first / name, other / name)
        body = replace(manifest, step=step, sequence=step, metrics={"loss": 1.0 / step})
        (other / own).write_bytes(names.encode_manifest(body))


def exponent(costs: Mapping[int, float]) -> float:
    """b of the power law cost = a * count^b: the slope of the least-squares line through the logarithms."""
    counts, seconds = [math.log(count) for count in costs], [math.log(cost) for cost in costs.values()]
    return statistics.linear_regression(counts, seconds).slope


def measurements(costs: Costs) -> list[Measurement]:
    """Pure."""
    return [_growth(operation, by_count) for operation, by_count in costs.items()]


def _growth(operation: str, by_count: Mapping[int, Sequence[float]]) -> Measurement:
    counts = sorted(by_count)
    each = {count: tuple(seconds / count for seconds in by_count[count]) for count in counts}
    rounds = zip(*(by_count[count] for count in counts), strict=True)
    exponents = tuple(exponent(dict(zip(counts, one, strict=True))) for one in rounds)
    fewest, most = counts[0], counts[-1]
    per_item = ", ".join(f"{quantity(statistics.median(each[count]), 's')} at {count:,}" for count in counts)
    whole = quantity(statistics.median(by_count[most]), "s")
    return Measurement(
        "P9",
        f"{operation}, exponent",
        "s",
        Side(f"each of {most:,}", each[most]),
        Side(f"each of {fewest:,}", each[fewest]),
        exponents,
        "",
        _GOAL,
        f"{operation}: per checkpoint {per_item}; {whole} for all {most:,}.",
    )
