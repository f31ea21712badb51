"""How large a training's state is, known after its first optimizer step: so that buffers can be provided in time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

_SLACK = 1.02
_LEAST = 1 << 20


def once_known(act: Callable[[int], object]) -> Callable[[], None]:
    """Call `act` once with the bytes of all parameters and optimizer states of this process.

    That is when an optimizer steps for the second time: all that train together have their state by then.
    Returns a function that calls it off.
    """
    seen: dict[int, torch.optim.Optimizer] = {}
    known = False

    def after_step(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        nonlocal known
        if known:
            return  # a hook can't be removed while hooks run
        if id(optimizer) not in seen:
            seen[id(optimizer)] = optimizer
            return
        known = True
        act(_bytes_of(seen.values()))
        seen.clear()

    return register_optimizer_step_post_hook(after_step).remove


def _bytes_of(optimizers: Any) -> int:
    tensors: dict[int, int] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            tensors.update({id(tensor): tensor.nbytes for tensor in group["params"]})
        for state in optimizer.state.values():
            tensors.update({id(value): value.nbytes for value in state.values() if isinstance(value, torch.Tensor)})
    return int(sum(tensors.values()) * _SLACK) + _LEAST
