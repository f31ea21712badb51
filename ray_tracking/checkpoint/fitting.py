"""Whether a stored state fits a live module or optimizer: found out before anything changes. No I/O.

In: a live object, the state of one. Out: the state by the object's own names, or CheckpointError.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ray_tracking.checkpoint.distributed_state import module_state, plain_name
from ray_tracking.errors import CheckpointError

UNFIT = (ValueError, KeyError, RuntimeError, TypeError, AttributeError, IndexError)
"""What an object raises that can't take a state."""


def fitted(value: Any, state: Any, where: str) -> Any:
    """`state` as `value` wants it. CheckpointError if it does not fit."""
    if isinstance(value, torch.nn.Module):
        return fit_module(value, state, where)
    if is_plain_optimizer(value):
        _check_groups(value, state, where)
    return state


def fit_module(module: torch.nn.Module, state: Any, where: str) -> Any:
    """`state` as `module` wants it (without the wrappers it was saved in); CheckpointError naming what does not fit."""
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{where}: the stored state is a {type(state).__name__}, not a module's state.")
    own = module_state(module)
    if state and all(str(key).startswith("module.") for key in state) and not any(key in own for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    if any(key not in own for key in state):
        names = {plain_name(key): key for key in own}
        state = {names.get(plain_name(str(key)), key): value for key, value in state.items()}
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} is {list(value.shape)} in the checkpoint and {list(own[key].shape)} in the module"
        for key, value in state.items()
        if key in own and hasattr(value, "shape") and hasattr(own[key], "shape") and value.shape != own[key].shape
    ]
    problems = shapes + [f"{key} is not in the checkpoint" for key in missing]
    problems += [f"{key} is not in the module" for key in unexpected]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointError(
            f"{where} does not fit: {shown}.", hint="Build the module with the arguments it was trained with."
        )
    return state


def is_plain_optimizer(value: Any) -> bool:
    """Whether it is an optimizer that takes its state as torch's base class does, and nobody hooks into that."""
    base = torch.optim.Optimizer
    kind = type(value)
    return (
        isinstance(value, base)
        and kind.load_state_dict is base.load_state_dict
        and kind._process_value_according_to_param_policy is base._process_value_according_to_param_policy
        and "load_state_dict" not in vars(value)
        and not value._optimizer_load_state_dict_pre_hooks
    )


def _check_groups(optimizer: torch.optim.Optimizer, state: Any, where: str) -> None:
    """What load_state_dict refuses, found before anything changes."""
    try:
        saved = [len(group["params"]) for group in state["param_groups"]]
        state["state"].items()
    except UNFIT as error:
        raise CheckpointError(f"{where} could not take its state: it is not that of an optimizer.") from error
    own = [len(group["params"]) for group in optimizer.param_groups]
    if saved != own:
        raise CheckpointError(
            f"{where} could not take its state: the groups have {saved} parameters in the checkpoint, {own} here.",
            hint="Build the optimizer over the same parameters and groups as when it was saved.",
        )
