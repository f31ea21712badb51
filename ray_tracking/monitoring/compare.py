"""Several runs side by side: where their configs differ, and their metrics.

In: records and overviews. Out: `Comparison`. Pure but for `compare`, which reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ray_tracking.monitoring.overview import Overview, overview
from ray_tracking.runs.store import RunStore

_ABSENT = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """`config[dotted key]` and `metrics[key]` hold one value per run, in the order of `runs`;
    None where a run has none."""

    runs: tuple[str, ...]
    status: tuple[str, ...]
    last_step: tuple[int, ...]
    config: Mapping[str, tuple[Any, ...]]
    metrics: Mapping[str, tuple[Mapping[str, float | None] | None, ...]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(store: RunStore, run_ids: Sequence[str], now: float) -> Comparison:
    """Raises UsageError if one of the runs is not there."""
    views = [overview(store, run_id, now) for run_id in run_ids]
    return comparison(views, [store.load(run_id).config for run_id in run_ids])


def comparison(views: Sequence[Overview], configs: Sequence[Mapping[str, Any]]) -> Comparison:
    keys = sorted({key for view in views for key in view.metrics})
    return Comparison(
        runs=tuple(view.run_id for view in views),
        status=tuple(view.status for view in views),
        last_step=tuple(view.last_step for view in views),
        config=differences(configs),
        metrics={key: tuple(view.metrics.get(key) for view in views) for key in keys},
    )


def differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """By dotted key, sorted: the values of every run, where they are not all the same."""
    flat = [flatten(config) for config in configs]
    keys = sorted({key for values in flat for key in values})
    rows = {key: tuple(values.get(key, _ABSENT) for values in flat) for key in keys}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`; lists are values, an empty mapping too."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{dotted}."))
        else:
            flat[dotted] = value
    return flat
