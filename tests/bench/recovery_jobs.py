"""P5 on the workers: the same training with this package and without it, killed where the plan says.

Steps, kills and their times are told by files in a folder that all processes share. Times are of the monotonic clock,
which is one for all processes of a machine.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

WORKERS = 2
_SAMPLES, _BATCH = 4096, 8
_WIDE, _LAYERS = 1024, 6


@dataclass(frozen=True, slots=True)
class Plan:
    """`kills`: the step after which a rank is killed, and that rank, in order. `steps` is the last of the training."""

    folder: str
    every: int
    steps: int
    kills: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Recovery:
    """Seconds since the kill: until the training function began again, had restored its state, had done its first step,
    and had done the first step that is new (`new`). `lost`: steps that were done before the kill and done again.
    """

    began: float
    restored: float
    first: float
    new: float
    lost: int


def read(plan: Plan) -> list[Recovery]:
    """What became of each kill, after the job."""
    found = []
    for number in range(len(plan.kills)):
        killed, after = (_notes(plan, number, name) for name in ("killed", "after"))
        began, restored, first, new = (after[name] - killed["time"] for name in ("began", "restored", "first", "new"))
        found.append(Recovery(began, restored, first, new, killed["step"] - after["from_step"]))
    return found


class Marks:
    """Told by every rank of each step it has done; kills as planned; rank 0 writes down how it goes on."""

    def __init__(self, plan: Plan, rank: int) -> None:
        self._plan = plan
        self._rank = rank
        self._times: dict[str, Any] = {"began": time.monotonic()}
        self._killed = sum(_path(plan, number, "killed").exists() for number in range(len(plan.kills)))
        self._recovers = self._killed > 0 and not _path(plan, self._killed - 1, "after").exists()

    def restored(self, from_step: int) -> None:
        self._times |= {"restored": time.monotonic(), "from_step": from_step}

    def done(self, step: int) -> None:
        self._times.setdefault("first", time.monotonic())
        if self._recovers and step > self._plan.kills[self._killed - 1][0]:
            self._recovers = False
            self._times["new"] = time.monotonic()
            if self._rank == 0:
                _write(self._plan, self._killed - 1, "after", self._times)
        if (step, self._rank) in self._plan.kills[self._killed : self._killed + 1]:
            _write(self._plan, self._killed, "killed", {"time": time.monotonic(), "step": step})
            os.kill(os.getpid(), signal.SIGKILL)


def _path(plan: Plan, number: int, name: str) -> Path:
    return Path(plan.folder, f"{number:02d}-{name}.json")


def _notes(plan: Plan, number: int, name: str) -> dict[str, Any]:
    notes: dict[str, Any] = json.loads(_path(plan, number, name).read_text())
    return notes


def _write(plan: Plan, number: int, name: str, notes: Mapping[str, Any]) -> None:
    path = _path(plan, number, name)
    path.with_suffix(".new").write_text(json.dumps(notes))
    path.with_suffix(".new").rename(path)


# -- what both train -----------------------------------------------------------------------------------


def net() -> nn.Module:
    """6 M parameters; with Adam's moments a state of 75 MB."""
    torch.manual_seed(0)
    layers = [layer for _ in range(_LAYERS) for layer in (nn.Linear(_WIDE, _WIDE), nn.GELU())]
    return nn.Sequential(*layers, nn.Linear(_WIDE, 10))


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(_SAMPLES, _WIDE, generator=generator)
    return TensorDataset(x, x[:, :10].argmax(1))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loss = nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


# -- with this package -----------------------------------------------------------------------------------


def tracked(run: Any) -> None:
    plan = Plan(**{**run.params["plan"], "kills": tuple(map(tuple, run.params["plan"]["kills"]))})
    marks = Marks(plan, run.rank)
    torch.set_num_threads(1)
    model = run.prepare(net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loader = run.loader(data(), batch_size=_BATCH)
    run.restore(model=model, optimizer=optimizer, loader=loader)
    marks.restored(run.step)
    from tests.bench.workload import KEYS, metrics_of

    for _ in run.epochs(1_000_000):
        for x, y in run.steps(loader):
            loss = train_step(model, optimizer, x, y)
            run.log_metrics({**metrics_of(run.step), KEYS[0]: loss})
            marks.done(run.step)
            if run.step >= plan.steps:
                return


# -- without it --------------------------------------------------------------------------------------------


def untracked(settings: Mapping[str, Any]) -> None:
    """As Ray's guide has it: rank 0 saves with torch.save, all ranks report, a restart loads what Ray names."""
    import ray.train
    import ray.train.torch

    plan = Plan(**settings)
    context = ray.train.get_context()
    rank = context.get_world_rank()
    marks = Marks(plan, rank)
    torch.set_num_threads(1)
    model = ray.train.torch.prepare_model(net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    step = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder, "state.pt"), weights_only=True)
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    marks.restored(step)
    for x, y in _batches_from(step, rank, context.get_world_size()):
        loss = train_step(model, optimizer, x, y)
        step += 1
        marks.done(step)
        if step % plan.every == 0:
            _report(model, optimizer, step, float(loss), rank)
        if step >= plan.steps:
            return


def _batches_from(step: int, rank: int, world_size: int) -> Iterator[Any]:
    """The batches after `step` steps; those of its epoch before it are skipped, and not read."""
    dataset = data()
    sampler = DistributedSampler(dataset, world_size, rank)
    loader = DataLoader(dataset, _BATCH, sampler=sampler)
    epoch, skip = divmod(step, len(loader))
    while True:
        sampler.set_epoch(epoch)
        indices = list(sampler)[skip * _BATCH :]
        for begin in range(0, len(indices), _BATCH):
            samples = [dataset[index] for index in indices[begin : begin + _BATCH]]
            yield tuple(torch.stack(part) for part in zip(*samples, strict=True))
        epoch, skip = epoch + 1, 0


def _report(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, loss: float, rank: int) -> None:
    import ray.train

    metrics = {"step": step, "loss": loss}
    if rank != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        torch.save(state, Path(folder, "state.pt"))
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def as_settings(plan: Plan) -> dict[str, Any]:
    return asdict(plan)
