"""A training function whose values tell which attempt logged them."""

from __future__ import annotations

import time

import torch
from torch import nn
from torch.utils.data import TensorDataset

from ray_tracking import Run

STEPS = 30
"""In an epoch of one worker."""


def slowly(run: Run) -> None:
    """`params.epochs` of 30 steps, each of `params.seconds`; the value logged is the step, the attempt is in `by`."""
    model = run.prepare(nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = run.loader(TensorDataset(torch.ones(STEPS, 2)), batch_size=1)
    run.restore(model=model, optimizer=optimizer, loader=loader)
    for _ in run.epochs(run.params["epochs"]):
        for (x,) in run.steps(loader):
            optimizer.zero_grad()
            model(x).pow(2).mean().backward()
            optimizer.step()
            run.log_metrics({"train/loss": float(run.step), "by": float(run.attempt)})
            time.sleep(run.params["seconds"])
