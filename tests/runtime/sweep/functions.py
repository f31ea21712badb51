"""Training functions of the sweep tests."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from ray_tracking import Run
from ray_tracking.examples import digits


def valley(run: Run) -> None:
    """val/loss is 1/(epoch + 1) above the distance of params.x from 0.3; params.how: ok, raise, kill, nan, hang.

    params.bulk: bytes in each checkpoint, to make it slow to write.
    """
    how, pause = run.params.get("how", "ok"), run.params.get("pause", 0.0)
    model = nn.Linear(2, 1)
    model.register_buffer("bulk", torch.zeros(run.params.get("bulk", 0), dtype=torch.uint8))
    model = run.prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = run.loader(TensorDataset(torch.ones(4, 2)), batch_size=2)
    run.restore(model=model, optimizer=optimizer, loader=loader)
    if "started" in run.params:
        with Path(run.params["started"]).open("a") as file:
            file.write(f"{run.params['x']!r} {run.step}\n")
    for epoch in run.epochs(run.params.get("epochs", 3)):
        for (x,) in run.steps(loader):
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        time.sleep(pause)
        value = abs(run.params["x"] - 0.3) + 1 / (epoch + 1)
        if epoch == 1 and how == "raise":
            raise ValueError("no good, with password=hunter2")
        if epoch == 1 and how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if epoch == 1 and how == "hang":
            time.sleep(600)
        run.log_metrics({"val/loss": float("nan") if epoch == 1 and how == "nan" else value, "epoch": epoch + 1})


def population(run: Run) -> None:
    """The digits example, two trials. Each start leaves what it restored in params.started: `<run id>-<attempt>.pt`.

    They begin to train at the same time: one that was through before the other came would give it nothing.
    """
    plain = run.restore

    def restore(**objects: Any) -> bool:
        found = plain(**objects)
        if run.rank == 0:
            weights = {name.removeprefix("module."): value for name, value in objects["model"].state_dict().items()}
            rates = [group["lr"] for group in objects["optimizer"].param_groups]
            state = {"weights": weights, "rates": rates, "step": run.step, "lr": run.params["lr"]}
            torch.save(state, Path(run.params["started"]) / f"{run.tracker.run_id}-{run.attempt}.pt")  # type: ignore[attr-defined]
            end = time.monotonic() + 240
            while len(list(Path(run.params["started"]).glob("*-1.pt"))) < 2:
                assert time.monotonic() < end, "the other trial did not start"
                time.sleep(0.05)
        return found

    run.restore = restore  # type: ignore[method-assign]
    digits.train(run)
