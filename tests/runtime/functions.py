"""Training functions of the tests: small, deterministic, on data of their own."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from ray.train import PreemptionInfo
from ray.train.v2._internal.execution.context import get_train_context
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset, TensorDataset

from ray_tracking import Run
from ray_tracking.checkpoint import CheckpointStore
from ray_tracking.errors import UsageError
from ray_tracking.runs.store import RunStore
from ray_tracking.storage import Storage


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(120, 6, generator=generator)
    return TensorDataset(x, (x.sum(1, keepdim=True) > 0).float())


def regression(run: Run) -> None:
    """Ten scalars a step; dies once after `params.die_at` steps, by `params.how`."""
    net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.1), nn.Linear(8, 1))
    model = run.prepare(net, parallel=run.params.get("parallel", "ddp"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader = run.loader(data(), batch_size=5)
    run.restore(model=model, optimizer=optimizer, loader=loader)
    for _epoch in run.epochs(run.params["epochs"]):
        for x, y in run.steps(loader):
            loss = nn.functional.binary_cross_entropy_with_logits(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log_metrics({"train/loss": loss, **{f"train/m{i}": run.step * 10 + i for i in range(9)}})
            _die_once(run)
        run.log_metrics({"val/loss": loss.item() + 1})
    weights = torch.cat([whole(p.detach()).flatten() for p in model.parameters()])
    run.log_text("weights", " ".join(float(w).hex() for w in weights))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be sharded over the ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _die_once(run: Run) -> None:
    if run.step != run.params.get("die_at") or run.rank != run.params.get("die_rank", 0):
        return
    marker = Path(run.params["marker"])
    if marker.exists():
        return
    _await_checkpoint(run)
    marker.touch()
    if run.params["how"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError("a bug in the training function, with password=hunter2hunter2")


def _await_checkpoint(run: Run) -> None:
    """Until the one before is written, of the only run there: what is tested is the resume, not the race."""
    runs, end = RunStore(Storage.open(run.config.storage)), time.monotonic() + 120
    every = run.config.training.default.save_steps
    due = (run.step - 1) // every * every if every else 0
    while due and time.monotonic() < end:
        infos = [info for name in runs.ids() for info in CheckpointStore(runs.directory(name)).checkpoints()]
        if any(info.step >= due for info in infos):
            return
        time.sleep(0.2)


def always_fails(run: Run) -> None:
    run.log_metrics({"train/loss": 1.0}, step=1)
    raise ValueError("no luck at all")


def logs_everything(run: Run) -> None:
    """Every kind of record, from rank 0; other ranks must not be heard."""
    run.log_metrics({"rank": run.rank}, step=1)
    run.log_rank_metrics({"speed": 10.0 * (run.rank + 1)}, step=1)
    run.log_histogram("h", torch.arange(10.0), step=1)
    run.log_text("t", "some text", step=1)
    run.log_image("i", torch.rand(3, 4, 4), step=1)
    run.log_params({"extra": 5})
    source = Path(run.params["artifact"])
    run.log_artifact(source)


class Numbered(Dataset[Any]):
    """120 samples that say which they are."""

    def __len__(self) -> int:
        return 120

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((6,), index / 120), index


def counts_samples(run: Run) -> None:
    """Writes down what each step of each rank was given; raises on every rank at `params.stops` when they are reached.

    `params.where`: in the body of the step, before the optimizer; or at the epoch's end.
    """
    model = run.prepare(nn.Linear(6, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = run.loader(Numbered(), batch_size=5)
    run.restore(model=model, optimizer=optimizer, loader=loader)
    notes = Path(run.params["notes"])
    for epoch in run.epochs(run.params["epochs"]):
        for x, indices in run.steps(loader):
            loss = model(x).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            if run.attempt == 1 and run.step == run.params.get("stop_in_step"):
                raise RuntimeError("no further")
            optimizer.step()
            line = {"attempt": run.attempt, "rank": run.rank, "step": run.step, "epoch": epoch}
            with (notes / f"{run.attempt}-{run.rank}").open("a") as file:
                file.write(json.dumps({**line, "indices": indices.tolist()}) + "\n")
            if run.attempt == run.params.get("preempted_in") and run.step == 3 and run.rank == 0:
                get_train_context().preemption_context.preemption_info = PreemptionInfo(
                    deadline_ms=None, preempted_node_to_ranks={}
                )
            if run.params.get("slow"):
                time.sleep(0.1)
        if run.attempt in run.params.get("stop_after_epoch_in", ()):
            raise RuntimeError("no further")


def worsens(run: Run) -> None:
    """12 steps an epoch, and a validation loss that is best after the first."""
    model = run.prepare(nn.Linear(6, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = run.loader(Numbered(), batch_size=5)
    run.restore(model=model, optimizer=optimizer, loader=loader)
    for epoch in run.epochs(run.params["epochs"]):
        for x, _ in run.steps(loader):
            optimizer.zero_grad()
            model(x).pow(2).mean().backward()
            optimizer.step()
        run.log_metrics({"val/loss": 1.0 + epoch})


def refuses(run: Run) -> None:
    raise UsageError("params.width: found 'wide'; allowed: a number.")


class NotAFunction:
    pass


def wrong_signature(run: Run, other: Any) -> None: ...


def forever(run: Run) -> None:
    """Logs a step every 50 ms until it is ended from outside; says on disk that it has begun."""
    for step in range(1, 100_000):
        run.log_metrics({"train/loss": 1.0 / step}, step=step)
        time.sleep(0.05)
        if step == 20:
            Path(run.params["marker"]).touch()
