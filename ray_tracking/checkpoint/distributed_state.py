"""The states of models and optimizers that are spread over the ranks: FSDP2, and DTensors however they were made.

By parameter names, each rank its own part, through torch's distributed state dicts. For the training thread; sends no
message.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch

from ray_tracking.checkpoint.sharding import is_sharded
from ray_tracking.errors import UsageError

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")
"""Of torch.compile and activation checkpointing; distributed state dicts leave them out of names."""


def sharded_state(name: str, value: Any, objects: Mapping[str, Any]) -> Any:
    """The state by parameter names of `objects[name]`, if it is a model or an optimizer with DTensors; else None.

    Its tensors are the live ones. Raises UsageError if the model of such an optimizer is not among `objects`.
    """
    if not has_shards(value):
        return None
    return module_state(value) if isinstance(value, torch.nn.Module) else optimizer_state(name, value, objects)


def module_state(module: torch.nn.Module) -> dict[str, Any]:
    """The live tensors by name. A tied DTensor is one object, whichever name it is found under."""
    if not has_shards(module):
        return module.state_dict()
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    state: dict[str, Any] = get_model_state_dict(module)
    first: dict[int, Any] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        key = plain_name(name)
        if key in state:
            state[key] = first.setdefault(id(parameter), state[key])
    return state


def plain_name(name: str) -> str:
    """The name of a parameter without what torch.compile and activation checkpointing put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def has_shards(value: Any) -> bool:
    """Whether it is a model or an optimizer with DTensors."""
    if isinstance(value, torch.nn.Module):
        _reshard(value)
        return any(map(is_sharded, chain(value.parameters(), value.buffers())))
    return isinstance(value, torch.optim.Optimizer) and any(map(is_sharded, parameters_of(value)))


def _reshard(module: torch.nn.Module) -> None:
    """After a forward pass (a validation, say) FSDP2 leaves the outermost weights whole, in place of the parameters."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for each in module.modules():
            if isinstance(each, fsdp.FSDPModule):
                each.reshard()


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    return chain.from_iterable(group["params"] for group in optimizer.param_groups)


def optimizer_state(name: str, optimizer: torch.optim.Optimizer, objects: Mapping[str, Any]) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = model_of(optimizer, objects)
    if model is None:
        raise UsageError(
            f"The parameters of {name!r} are sharded, and no object that is saved with it has all of them: "
            "its state can't be stored by their names.",
            hint="Give the model too: run.restore(model=model, optimizer=optimizer). A model of several modules "
            "can be given as one torch.nn.ModuleDict.",
        )
    if optimizer.state:
        return dict(get_optimizer_state_dict(model, optimizer))
    # torch makes a step with zero gradients to give an optimizer that has no state one, which then counts that step.
    first = next(parameters_of(optimizer))
    optimizer.state[first] = {}
    try:
        state = dict(get_optimizer_state_dict(model, optimizer))
    finally:
        del optimizer.state[first]
    return {**state, "state": {}}


def model_of(optimizer: torch.optim.Optimizer, objects: Mapping[str, Any]) -> torch.nn.Module | None:
    """The smallest of the modules that have all parameters of the optimizer."""
    wanted = {id(parameter) for parameter in parameters_of(optimizer)}
    sizes = []
    for number, value in enumerate(objects.values()):
        if isinstance(value, torch.nn.Module):
            _reshard(value)
            own = {id(parameter) for parameter in value.parameters()}
            if wanted <= own:
                sizes.append((len(own), number, value))
    return min(sizes)[2] if sizes else None
