"""Last, least and greatest value of every metric, kept as records arrive: what `runs show` prints without a scan."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ray_tracking.records import Kind, Record
from ray_tracking.storage import Storage

if TYPE_CHECKING:
    import pyarrow

_FILE = "summary.json"
_STEPPED = frozenset({Kind.SCALAR, Kind.HISTOGRAM, Kind.TEXT, Kind.IMAGE, Kind.RANK_SCALAR})
"""The kinds whose step says how far the run has come."""
_HIGHER_IS_BETTER = (
    "acc", "f1", "auc", "precision", "recall", "score", "reward", "return", "r2", "iou", "map", "bleu",
    "rouge", "throughput", "per_sec", "samples_s", "psnr", "ssim",
)  # fmt: skip


def better_mode(key: str, monitor: str | None = None, mode: str = "min") -> str:
    """`min` or `max`: which end of a metric is its best. The monitor has its own mode, others go by their name."""
    if key == monitor:
        return mode
    name = key.rsplit("/", 1)[-1].lower()
    if "loss" in name or "error" in name:
        return "min"
    return "max" if any(word in name for word in _HIGHER_IS_BETTER) else "min"


@dataclass(slots=True)
class MetricSummary:
    """One metric. `least` and `greatest` are over finite values only, None while there is none."""

    last: float
    last_step: int
    least: float | None = None
    greatest: float | None = None
    count: int = 0

    def add(self, values: list[float], last_step: int) -> None:
        """Values in the order in which they were logged, the last one at `last_step`."""
        self.last, self.last_step = values[-1], last_step
        self.count += len(values)
        finite = [value for value in values if math.isfinite(value)]
        if finite:
            self.least = min(finite if self.least is None else [self.least, *finite])
            self.greatest = max(finite if self.greatest is None else [self.greatest, *finite])


@dataclass(slots=True)
class Summary:
    """All metrics of a run up to journal offset `offset` (exclusive), and the step reached."""

    offset: int = 0
    last_step: int = 0
    updated: float = 0.0
    """Unix time of the last sign of life of the tracker process."""
    metrics: dict[str, MetricSummary] = field(default_factory=dict)

    def add(self, records: Iterable[Record]) -> None:
        """Take in journal rows; those before `offset` are known already and left out."""
        found: dict[str, list[float]] = {}
        steps: dict[str, int] = {}
        expected, reached = self.offset, self.last_step
        for kind, key, step, _, value, _, _, attempt, _, offset in records:
            if offset < expected:
                continue
            expected = offset + 1
            if kind is Kind.ATTEMPT and attempt > 1:
                reached = min(reached, max(step, 0))
            elif kind in _STEPPED:
                if step > reached:
                    reached = step
                if kind is Kind.SCALAR and value is not None:
                    found.setdefault(key, []).append(value)
                    steps[key] = step
        self.offset, self.last_step = expected, reached
        for key, values in found.items():
            metric = self.metrics.get(key)
            if metric is None:
                metric = self.metrics[key] = MetricSummary(values[0], steps[key])
            metric.add(values, steps[key])

    def replace_metrics(self, effective: pyarrow.Table) -> None:
        """Take the metrics from the effective history (`JournalReader.effective`) instead."""
        import pyarrow.compute as pc

        finite = pc.if_else(pc.is_finite(effective["value"]), effective["value"], None)
        found = (
            effective.append_column("finite", finite)
            .group_by("key", use_threads=False)
            .aggregate([("value", "last"), ("step", "last"), ("finite", "min"), ("finite", "max"), ("value", "count")])
        )
        self.metrics = {
            row["key"]: MetricSummary(
                row["value_last"], row["step_last"], row["finite_min"], row["finite_max"], row["value_count"]
            )
            for row in found.to_pylist()
        }

    def best(self, monitor: str | None, mode: str) -> dict[str, dict[str, float | None]]:
        """`{key: {last, best}}`, best by `better_mode`."""
        return {
            key: {
                "last": metric.last,
                "best": metric.least if better_mode(key, monitor, mode) == "min" else metric.greatest,
            }
            for key, metric in self.metrics.items()
        }

    def encode(self) -> bytes:
        """The whole as JSON."""
        metrics = {key: [m.last, m.last_step, m.least, m.greatest, m.count] for key, m in self.metrics.items()}
        document: Mapping[str, Any] = {
            "offset": self.offset,
            "last_step": self.last_step,
            "updated": self.updated,
            "metrics": metrics,
        }
        return json.dumps(document).encode()

    @staticmethod
    def write(run: Storage, document: bytes) -> None:
        """Save what `encode` made: apart, so that no lock need be held while the storage writes."""
        run.write_bytes(_FILE, document)

    def save(self, run: Storage) -> None:
        self.write(run, self.encode())

    @classmethod
    def load(cls, run: Storage) -> Summary:
        """The saved summary; an empty one if there is none or it is damaged (it can be made anew from the journal)."""
        try:
            document = json.loads(run.read_bytes(_FILE))
            metrics = {key: MetricSummary(*values) for key, values in document["metrics"].items()}
            return cls(document["offset"], document["last_step"], document["updated"], metrics)
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return cls()
