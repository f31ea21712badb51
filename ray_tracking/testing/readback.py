"""What a backend holds, read by its own client, as plain points (key, step, value) in the order it gives them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ray_tracking.errors import BackendError
from ray_tracking.testing.backends import Point
from ray_tracking.tracking.backends.mlflow_names import original_name
from ray_tracking.tracking.backends.wandb_rows import COMPANION, run_files, value_of

_ALL = {"scalars": 0, "tensors": 0, "images": 0, "histograms": 0, "compressedHistograms": 0, "audio": 0}
_MLFLOW_LARGEST = 1.7976931348623157e308  # its SQL store has no infinity
_WANDB_SECONDS = 60


def tensorboard_events(folder: str | Path) -> Any:
    """TensorBoard's own reader over a run's folder, with nothing thinned out."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance=_ALL)
    reader.Reload()
    return reader


def tensorboard_points(folder: str | Path) -> list[Point]:
    """Scalars only; their values are 32-bit floats there."""
    reader = tensorboard_events(folder)
    return [(tag, event.step, event.value) for tag in reader.Tags()["scalars"] for event in reader.Scalars(tag)]


def mlflow_run(tracking_uri: str, run_id: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri).get_run(run_id)


def mlflow_points(tracking_uri: str, run_id: str) -> list[Point]:
    """Every metric's whole history, page by page, under the key it was logged with."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri)
    run = client.get_run(run_id)
    points: list[Point] = []
    for name in run.data.metrics:
        key, token = original_name(name, run.data.tags), None
        while True:
            page = client._tracking_client.store.get_metric_history(run_id, name, max_results=1000, page_token=token)
            points += [(key, metric.step, _mlflow_value(metric.value)) for metric in page]
            if not (token := page.token):
                break
    return points


def _mlflow_value(value: float) -> float:
    return value if abs(value) < _MLFLOW_LARGEST else value * 2  # the largest float stands for infinity


def wandb_files(folder: str | Path, run_id: str) -> list[str]:
    """The run's files below a `wandb` folder, oldest first."""
    return run_files(str(folder), run_id)


def wandb_records(folder: str | Path, run_id: str, *, whole: bool = True) -> list[dict[str, Any]]:
    """All records of the run's offline files; `whole=False` takes files that a killed process left.

    Raises BackendError if W&B itself can't read one.
    """
    wandb = os.path.join(os.path.dirname(sys.executable), "wandb")
    records: list[dict[str, Any]] = []
    for path in wandb_files(folder, run_id):
        command = [wandb, "leet", "inspect", "--json", path]
        done = subprocess.run(command, capture_output=True, timeout=_WANDB_SECONDS)
        if done.returncode != 0 and whole:
            raise BackendError(f"W&B can't read {path}: {done.stderr.decode(errors='replace').strip()}")
        records += [json.loads(line) for line in done.stdout.splitlines()]
    return records


def wandb_rows(folder: str | Path, run_id: str, *, whole: bool = True) -> list[dict[str, Any]]:
    return [
        record["history"]["item"]
        for record in wandb_records(folder, run_id, whole=whole)
        if record["type"] == "history"
    ]


def wandb_points(folder: str | Path, run_id: str, *, whole: bool = True) -> list[Point]:
    """Scalars of the run's offline files, each at the step it was logged with."""
    points: list[Point] = []
    for row in wandb_rows(folder, run_id, whole=whole):
        for key, value in row.items():
            if key.startswith("_") or key.endswith(COMPANION):
                continue
            if isinstance(value, int | float) or value in ("NaN", "Infinity", "-Infinity"):
                step, shown = value_of(row, key)
                points.append((key, step, float(shown)))
    return points


def comparable(points: Iterable[Point], *, single: bool = False) -> list[tuple[str, int, str]]:
    """Sorted, and with NaN equal to NaN; `single`: as 32-bit floats."""
    import numpy

    with numpy.errstate(over="ignore"):
        return sorted(
            (key, step, repr(float(numpy.float32(value)) + 0.0 if single else value + 0.0))
            for key, step, value in points
        )
