from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ray_tracking.runtime.body import StepBody


def optimizers(count: int) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1) for _ in range(count)]


def steps(body: StepBody, count: int) -> Iterator[int]:
    for step in range(count):
        with body:
            yield step


@pytest.mark.parametrize("stepped", [0, 1, 2])
def test_a_step_is_whole_when_every_optimizer_has_stepped(stepped: int) -> None:
    body = StepBody()
    both = optimizers(2)
    body.watch([*both, torch.nn.Linear(1, 1)])
    assert body.is_whole

    def train() -> None:
        for _ in steps(body, 3):
            for optimizer in both[:stepped]:
                optimizer.step()
            raise ValueError("in the body")

    with pytest.raises(ValueError, match="in the body"):
        train()
    assert body.is_whole == (stepped == 2)


def test_between_steps_it_is_whole() -> None:
    body = StepBody()
    (optimizer,) = optimizers(1)
    body.watch([optimizer])
    for _ in steps(body, 3):
        assert not body.is_whole
        optimizer.step()
        assert body.is_whole
    assert body.is_whole


def test_without_an_optimizer_the_middle_of_a_step_is_never_whole() -> None:
    body = StepBody()
    body.watch([torch.nn.Linear(1, 1)])
    for _ in steps(body, 1):
        assert not body.is_whole
    assert body.is_whole
