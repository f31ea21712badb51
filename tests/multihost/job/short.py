"""A training of some seconds, the same to the last bit each time. `submit` sends this folder to the hosts."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

SAMPLES = 64


def train(run: Any) -> None:
    """`params`: epochs, pause (seconds after each step, so that there is time to break something)."""
    dice = torch.Generator().manual_seed(7)
    data = TensorDataset(torch.randn(SAMPLES, 8, generator=dice), torch.randn(SAMPLES, 1, generator=dice))
    model = run.prepare(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 1)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loader = run.loader(data, batch_size=4, shuffle=True)
    run.restore(model=model, optimizer=optimizer, loader=loader)
    for _ in run.epochs(run.params["epochs"]):
        for inputs, targets in run.steps(loader):
            loss = nn.functional.mse_loss(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log_metrics({"train/loss": loss})
            time.sleep(run.params["pause"])
        run.log_metrics({"val/loss": loss})
