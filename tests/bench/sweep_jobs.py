"""P6: the training of the trials, with this package and in a plain Ray Tune sweep, and what one trial costs directly.

Each trial writes when its training began and ended, on the monotonic clock: one for all processes of a machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.bench.machine import ROOT
from tests.bench.workload import THREE_BACKENDS

METRIC = "val/loss"
_BATCH, _WIDE = 128, 512


@dataclass(frozen=True, slots=True)
class Sweep:
    """`trials`, `at_once` of them at a time, each of `epochs` epochs of `steps` steps; runs lie beside `folder`."""

    folder: str
    trials: int
    at_once: int
    epochs: int
    steps: int

    @property
    def params(self) -> dict[str, Any]:
        return {"marks": str(Path(self.folder, "marks")), "epochs": self.epochs, "steps": self.steps}


def turnarounds(sweep: Sweep) -> list[float]:
    """Seconds from the end of one trial's training to the beginning of the next one's, of trials run one at a time."""
    marks = [json.loads(line) for line in Path(sweep.folder, "marks").read_text().splitlines()]
    marks.sort(key=lambda mark: mark["began"])
    return [after["began"] - before["ended"] for before, after in pairwise(marks)]


def training(params: Mapping[str, Any], log: Callable[[dict[str, Any]], Any], report: Callable[[float], Any]) -> None:
    """What both sides do: a small network, two numbers logged each step, the metric reported at each epoch's end."""
    began = time.monotonic()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(_WIDE, _WIDE), nn.GELU(), nn.Linear(_WIDE, _WIDE), nn.GELU(), nn.Linear(_WIDE, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=params["lr"])
    x = torch.randn(_BATCH, _WIDE)
    y = torch.randint(10, (_BATCH,))
    step = 0
    for epoch in range(params["epochs"]):
        for _ in range(params["steps"]):
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            log({"train/loss": loss, "train/accuracy": step / (step + 1)})
        if epoch == params["epochs"] - 1:  # what comes after, this last report too, is no more training
            _mark(params["marks"], began)
        report(float(loss.detach()))


def _mark(path: str, began: float) -> None:
    line = json.dumps({"began": began, "ended": time.monotonic()}) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


# -- with this package -------------------------------------------------------------------------------------------------


def tracked(run: Any) -> None:
    def log(metrics: dict[str, Any]) -> None:
        run.step += 1
        run.log_metrics(metrics)

    training(run.params, log, lambda value: run.log_metrics({METRIC: value}))


def run_tracked(sweep: Sweep) -> float:
    """Seconds of the sweep, from the call to its result."""
    from ray_tracking import TrainingManager

    config: dict[str, Any] = {
        "name": "bench",
        "storage": str(Path(sweep.folder).with_name("runs")),
        "params": sweep.params,
        "experiment_tracking": THREE_BACKENDS,
        "training": {"default": {"save_steps": None, "save_at_end": False}},
        "sweep": {
            "metric": METRIC,
            "mode": "min",
            "num_samples": sweep.trials,
            "max_concurrent": sweep.at_once,
            "space": {"lr": {"loguniform": [1e-4, 1e-3]}},
        },
    }
    begin = time.perf_counter()
    found = TrainingManager(config).sweep(tracked)
    seconds = time.perf_counter() - begin
    assert [trial.status for trial in found.trials] == ["completed"] * sweep.trials, found
    return seconds


# -- without it --------------------------------------------------------------------------------------------------------


def untracked(params: Mapping[str, Any]) -> None:
    from ray import tune

    training(params, lambda metrics: None, lambda value: tune.report({METRIC: value}))


def run_untracked(sweep: Sweep) -> float:
    """The same with Ray Tune alone: no loggers, processes used again, trials that need no new placement."""
    from ray import tune

    begin = time.perf_counter()
    found = tune.run(
        untracked,
        name="plain",
        storage_path=str(Path(sweep.folder, "plain")),
        config={**sweep.params, "lr": tune.loguniform(1e-4, 1e-3)},
        num_samples=sweep.trials,
        max_concurrent_trials=sweep.at_once,
        resources_per_trial={"cpu": 1},
        metric=METRIC,
        mode="min",
        reuse_actors=True,
        verbose=0,
    )
    seconds = time.perf_counter() - begin
    assert len(found.trials) == sweep.trials
    return seconds


# -- what a trial costs that opens its backends itself ---------------------------------------------------------------


def direct(folder: Path) -> float:
    """Seconds until a new process has imported W&B and MLflow, opened a run in each, and ended both."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return float(done.stdout.splitlines()[-1])


def _open_directly(folder: str) -> None:
    begin = time.perf_counter()
    import mlflow
    import wandb

    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
    run = wandb.init(project="bench", mode="offline", dir=folder, settings=settings, config={"lr": 1e-3})
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    mlflow.set_experiment("bench")
    mlflow.start_run()
    mlflow.log_params({"lr": 1e-3})
    mlflow.end_run()
    run.finish()
    print(time.perf_counter() - begin)


if __name__ == "__main__":
    _open_directly(sys.argv[1])
