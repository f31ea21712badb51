"""Where a run stands when it is saved: what `epochs`, `steps` and an exception make of it. Without Ray's workers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from ray_tracking import get_config
from ray_tracking.checkpoint import CheckpointStrategy
from ray_tracking.runtime.agenda import Agenda
from ray_tracking.runtime.context import Position, Run
from ray_tracking.tracking.base import NoopTracker


class NotedSaver:
    """Stands for the Saver: asks the real strategy, notes what is saved with where the loader stands."""

    def __init__(self, **rules: Any) -> None:
        self.strategy = CheckpointStrategy(**rules)
        self.newest_step = -1
        self.saved: list[tuple[int, int, int, int]] = []
        """(step, epoch, the loader's epoch, its samples consumed)"""
        self._objects: dict[str, Any] = {}

    @property
    def has_objects(self) -> bool:
        return bool(self._objects)

    def restore(self, objects: dict[str, Any]) -> None:
        self._objects = dict(objects)

    def prepare(self) -> None: ...

    def why_due(self, step: int, metric: Any, **told: bool) -> str | None:
        told.pop("timed")
        last = self.saved[-1][0] if self.saved else None
        return self.strategy.should_save(step, metric(), last_saved_step=last, **told)

    def save(self, step: int, epoch: int, metrics: Any, reason: str) -> bool:
        loader = self._objects["loader"]
        self.saved.append((step, epoch, loader.epoch, loader.consumed))
        return True

    def save_alone(self, step: int, epoch: int, metrics: Any, error: BaseException) -> None:
        if not self.saved or self.saved[-1][0] != step:
            self.save(step, epoch, metrics, "exception")

    def finish_writing(self) -> None: ...

    def close(self) -> None: ...


def run_with(saver: Any) -> Run:
    return Run(
        get_config("testing"),
        rank=0,
        world_size=1,
        local_rank=0,
        device=torch.device("cpu"),
        attempt=1,
        position=Position(),
        tracker=NoopTracker(),
        log_rank_metrics=lambda *_: None,
        saver=saver,
        agenda=Agenda(lambda: 0),
        latest=dict,
        announce=lambda step: None,
    )


def train(run: Run, epochs: int, *, raise_after: int | None = None, checkpoint_after: bool = False) -> None:
    """Three steps of four samples an epoch."""
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = run.loader(TensorDataset(torch.rand(12, 1)), batch_size=4)
    run.restore(model=model, optimizer=optimizer, loader=loader)
    for epoch in run.epochs(epochs):
        for (x,) in run.steps(loader):
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()
        if raise_after == epoch:
            raise RuntimeError("in the validation")
    if checkpoint_after:
        run.checkpoint(force=True)
    if raise_after == epochs:
        raise RuntimeError("after the last epoch")


@pytest.mark.parametrize(
    ("rules", "saved"),
    [
        ({"save_steps": 2}, [(2, 0, 0, 8), (4, 1, 1, 4), (6, 2, 2, 0)]),  # 6 is the second epoch's last step
        ({"save_steps": None, "save_on_epoch_end": True}, [(3, 1, 1, 0), (6, 2, 2, 0)]),
        ({"save_steps": None}, [(6, 2, 2, 0)]),
    ],
)
def test_a_checkpoint_says_the_epoch_that_its_loader_stands_in(rules: Any, saved: Any) -> None:
    saver = NotedSaver(**rules)
    run = run_with(saver)
    train(run, 2)
    run.finish()
    assert saver.saved == saved


def test_one_asked_for_after_the_last_epoch_does_not_begin_it_again() -> None:
    saver = NotedSaver(save_steps=None)
    train(run_with(saver), 2, checkpoint_after=True)
    assert saver.saved == [(6, 2, 2, 0)]


@pytest.mark.parametrize(("raise_after", "saved"), [(1, (6, 1, 1, 12)), (2, (6, 2, 2, 0))])
def test_after_an_exception_the_validation_is_repeated_and_no_batch(raise_after: int, saved: Any) -> None:
    saver = NotedSaver(save_steps=None)
    run = run_with(saver)
    with pytest.raises(RuntimeError) as raised:
        train(run, 2, raise_after=raise_after)
    run.save_after(raised.value)
    assert saver.saved == [saved]
