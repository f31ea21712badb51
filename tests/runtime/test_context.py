"""Where a run stands when it is saved: what `epochs`, `steps` and an exception make of it. Without Ray's workers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from ray_tracking import get_config
from ray_tracking.checkpoint import CheckpointStrategy
from ray_tracking.runtime.agenda import STOP, Agenda
from ray_tracking.runtime.context import Position, Run
from ray_tracking.runtime.hangs import Pulse
from ray_tracking.runtime.stopping import GRACE_MEETINGS, TrainingStopped
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


def run_with(saver: Any, agenda: Agenda | None = None) -> Run:
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
        agenda=agenda or Agenda(lambda: 0),
        latest=dict,
        announce=lambda step: None,
        pulse=Pulse(),
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


# --- a run that is asked to end early ---------------------------------------------------------------------------


class EveryStep(Agenda):
    """The ranks meet after each step; from the meeting number `at` on they are told to stop."""

    def __init__(self, at: int) -> None:
        meetings = iter(range(1, 1_000_000))
        super().__init__(lambda: STOP if next(meetings) >= at else 0)
        self._steps_until = lambda now: 1  # type: ignore[method-assign]


class Loop:
    """Three steps of four samples an epoch; a hook after each optimizer step, one before it, one at the epoch's end."""

    def __init__(self, stop_at: int, **rules: Any) -> None:
        self.saver = NotedSaver(**{"save_steps": None, **rules})
        self.run = run_with(self.saver, EveryStep(stop_at))
        model = nn.Linear(1, 1)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.loader = self.run.loader(TensorDataset(torch.rand(12, 1)), batch_size=4)
        self.run.restore(model=model, optimizer=self.optimizer, loader=self.loader)

    def epochs(self) -> Iterator[int]:
        return self.run.epochs(4)

    def steps(self) -> Iterator[Any]:
        return self.run.steps(self.loader)


def test_a_function_that_never_asks_is_left_after_the_same_step() -> None:
    loop = Loop(stop_at=2)
    left = []

    def train() -> None:
        for _ in loop.epochs():
            try:
                for _ in loop.steps():
                    with contextlib.suppress(Exception):  # what survives its own errors does not survive this
                        loop.optimizer.step()
            finally:
                left.append(loop.run.step)

    with pytest.raises(TrainingStopped):
        train()
    assert left == [2]
    assert loop.saver.saved == [(2, 0, 0, 8)]
    assert not loop.run.was_stopped, "that is for functions that return"


def test_at_an_epochs_last_step_the_validation_comes_first() -> None:
    loop = Loop(stop_at=3)
    validated = []

    def train() -> None:
        for epoch in loop.epochs():
            for _ in loop.steps():
                loop.optimizer.step()
            validated.append(epoch)

    with pytest.raises(TrainingStopped):
        train()
    assert validated == [0]
    assert loop.saver.saved == [(3, 1, 1, 0)]


def test_a_stop_in_the_last_epochs_last_step_is_an_end() -> None:
    loop = Loop(stop_at=12)
    for _ in loop.epochs():
        for _ in loop.steps():
            loop.optimizer.step()
    loop.run.finish()
    assert loop.saver.saved == [(12, 4, 4, 0)]
    assert not loop.run.was_stopped


def test_a_function_that_asks_and_returns_is_stopped_not_completed() -> None:
    loop = Loop(stop_at=3, save_at_end=False)

    def train() -> None:
        for _ in loop.epochs():
            for _ in loop.steps():
                loop.optimizer.step()
                if loop.run.should_stop():
                    return

    train()
    loop.run.finish()
    assert loop.run.was_stopped
    assert loop.saver.saved == [(2, 0, 0, 8)], "each step meets twice here: by steps and by should_stop"


def test_one_that_leaves_only_the_inner_loop_does_not_lose_the_rest_of_the_epoch() -> None:
    loop = Loop(stop_at=3)

    def train() -> None:
        for _ in loop.epochs():
            for _ in loop.steps():
                loop.optimizer.step()
                if loop.run.should_stop():
                    break

    with pytest.raises(TrainingStopped):
        train()
    assert loop.saver.saved == [(2, 0, 0, 8)]


def test_one_that_leaves_in_the_middle_of_a_step_keeps_the_checkpoint_before() -> None:
    loop = Loop(stop_at=4, save_steps=1)

    def train() -> None:
        for _ in loop.epochs():
            for _ in loop.steps():
                if loop.run.should_stop():
                    return
                loop.optimizer.step()

    train()
    loop.run.finish()
    assert loop.run.was_stopped
    assert loop.saver.saved == [(1, 0, 0, 4), (2, 0, 0, 8)], "not step 3, whose optimizer has not stepped"


def test_one_that_asks_and_goes_on_is_left_at_the_epochs_end_or_after_a_while() -> None:
    loop = Loop(stop_at=2)

    def train() -> None:
        for _ in loop.epochs():
            for _ in loop.steps():
                loop.optimizer.step()
                loop.run.should_stop()

    with pytest.raises(TrainingStopped):
        train()
    assert loop.saver.saved == [(3, 1, 1, 0)]
    endless = Loop(stop_at=3)

    def train_for_ever() -> None:
        while True:  # no epochs
            for _ in endless.steps():
                endless.optimizer.step()
                endless.run.should_stop()

    with pytest.raises(TrainingStopped):
        train_for_ever()
    assert endless.run.step == 2 + GRACE_MEETINGS // 2
