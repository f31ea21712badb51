"""Putting a stored state into models and optimizers that are spread over the ranks, or were when it was saved.

At any world size, and between sharded and whole: each rank copies the part it is to hold, straight from where it lies.
For the training thread; sends no message.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from ray_tracking.checkpoint.distributed_state import (
    has_shards,
    model_of,
    module_state,
    optimizer_state,
    parameters_of,
)
from ray_tracking.checkpoint.regions import cut
from ray_tracking.checkpoint.sharding import is_sharded, piece_of
from ray_tracking.errors import CheckpointError

if TYPE_CHECKING:
    from ray_tracking.checkpoint.reader import OpenCheckpoint

_Parts = Sequence[tuple[Sequence[int], torch.Tensor]]
"""Where each begins in a region, and what stands there."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Stands for a sharded tensor of a checkpoint in a state. `find` gives a region of it, by offset and size."""

    shape: torch.Size
    dtype: torch.dtype
    find: Callable[[tuple[int, ...], tuple[int, ...]], _Parts]


def stand_ins(opened: OpenCheckpoint, name: str, rank: int) -> Callable[..., Any]:
    """For `OpenCheckpoint.state`: a `StoredTensor` for every sharded tensor of the object `name`."""
    family = opened.family_of(name, rank)

    def stand_in(tensor: str, shape: tuple[int, ...], dtype: torch.dtype) -> StoredTensor:
        def find(offset: tuple[int, ...], size: tuple[int, ...]) -> _Parts:
            return opened.parts(family, tensor, offset, size, dtype, rank)

        return StoredTensor(torch.Size(shape), dtype, find)

    return stand_in


def sharded_load(value: Any, state: Any, objects: Mapping[str, Any], where: str) -> Callable[[], object] | None:
    """What puts `state` into `value`, one of `objects`, if it holds DTensors or `state` does or did; else None.

    A module's `state` must have its names and shapes. All files that this rank needs are read and verified when this
    returns, and nothing has changed. Raises CheckpointError if an optimizer's parameters have other names.
    """
    stored = any(isinstance(tensor, StoredTensor) for tensor in _tensors_in(state))
    if isinstance(value, torch.nn.Module):
        return _module_load(value, state, where) if stored or has_shards(value) else None
    if isinstance(value, torch.optim.Optimizer) and _has_groups(state):
        by_name = _is_by_name(state)
        if not stored and not by_name and not has_shards(value):
            return None
        return _optimizer_load(value, _in_own_order(value, state, objects, where), by_name, where)
    # What else there is can have DTensors only where a model has (an average of its weights, say).
    live = value.state_dict() if stored or any(map(has_shards, objects.values())) else None
    if not stored and not any(map(is_sharded, _tensors_in(live))):
        return None
    filling = _Filling(where)
    filling.visit(state, live)
    return partial(_load_filled, value, state, filling)


def _module_load(module: torch.nn.Module, state: Mapping[str, Any], where: str) -> Callable[[], None]:
    live = module_state(module)
    filling = _Filling(where)
    for key, stored in state.items():
        own = live[key]
        if isinstance(own, torch.Tensor) and isinstance(stored, torch.Tensor | StoredTensor):
            filling.fill(own, stored, key)
        else:
            live[key] = copy.deepcopy(stored)

    def load() -> None:
        filling.run()
        if not has_shards(module):
            module.load_state_dict(live)
            return
        from torch.distributed.checkpoint.state_dict import set_model_state_dict

        set_model_state_dict(module, live)

    return load


def _optimizer_load(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any], by_name: bool, where: str
) -> Callable[[], None]:
    parameters = list(parameters_of(optimizer))
    filling = _Filling(where, keep=parameters)
    for number, item in state["state"].items():
        if number not in range(len(parameters)):
            filling.visit(item, None)
            continue
        live = optimizer.state.get(parameters[number])
        filling.visit(item, live, like=parameters[number], from_whole=not by_name)
    filling.visit({key: item for key, item in state.items() if key != "state"}, None)
    return partial(_load_filled, optimizer, state, filling)


def _load_filled(value: Any, state: Any, filling: _Filling) -> None:
    filling.run()
    value.load_state_dict(copy.deepcopy(state, dict(filling.made)))


def _has_groups(state: Any) -> bool:
    """Whether it is the state of an optimizer as torch gives it."""
    return (
        isinstance(state, Mapping)
        and isinstance(state.get("state"), Mapping)
        and isinstance(state.get("param_groups"), list)
        and all(isinstance(group, Mapping) and "params" in group for group in state["param_groups"])
    )


def _is_by_name(state: Mapping[str, Any]) -> bool:
    return any(isinstance(key, str) for group in state["param_groups"] for key in group["params"])


def _in_own_order(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any], objects: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """`state` by the numbers of the optimizer's own parameters. Without their names: the order is taken to be the same.

    The names of the parameters that a group may have beside its numbers are left to the optimizer.
    """
    saved = [list(group["params"]) for group in state["param_groups"]]
    order = saved
    model = model_of(optimizer, objects) if _is_by_name(state) else None
    if model is not None:
        order = [list(group["params"]) for group in optimizer_state("", optimizer, {"": model})["param_groups"]]
        if list(map(set, order)) != list(map(set, saved)):
            known, own = set(chain.from_iterable(saved)), set(chain.from_iterable(order))
            only = [f"{name} is not in the checkpoint" for name in sorted(own - known)]
            only += [f"{name} is not here" for name in sorted(known - own)]
            raise CheckpointError(
                f"{where} does not fit: {'; '.join(only[:5]) or 'the groups hold other parameters'}.",
                hint="Build the optimizer over the same parameters and groups as when it was saved.",
            )
    numbers = {key: number for number, key in enumerate(chain.from_iterable(order))}
    groups = [
        {**{key: item for key, item in group.items() if key != "param_names"}, "params": [numbers[key] for key in keys]}
        for group, keys in zip(state["param_groups"], order, strict=True)
    ]
    own_state = {numbers.get(key, key): item for key, item in state["state"].items()}
    return {**state, "state": own_state, "param_groups": groups}


class _Filling:
    """Finds for every tensor of a state the live one to fill, or makes one, and where its part lies; `run` copies.

    `made`: by id of the stored tensor the one that stands for it. Tensors of `keep` are never filled.
    """

    def __init__(self, where: str, keep: Sequence[torch.Tensor] = ()) -> None:
        self.made: dict[int, torch.Tensor] = {}
        self._where = where
        self._taken = {_address(tensor) for tensor in keep}
        self._copies: list[tuple[torch.Tensor, _Parts]] = []

    def run(self) -> None:
        with torch.no_grad():
            for local, parts in self._copies:
                for begin, part in parts:
                    cut(local, begin, part.shape).copy_(part)

    def visit(self, stored: Any, live: Any, *, like: Any = None, from_whole: bool = False, path: str = "") -> None:
        """`live`: what stands at the same place now. `like`: the parameter whose state it is; `from_whole`: it was
        saved by an optimizer that knew no DTensors.
        """
        if isinstance(stored, torch.Tensor | StoredTensor):
            if id(stored) not in self.made:
                target = live if self._fits(live, stored, like, path) else _fresh(stored, live, like, from_whole, path)
                self.made[id(stored)] = target
                self._taken.add(_address(target))
                self.fill(target, stored, path)
            return
        for key, item in _items(stored):
            own = dict(_items(live)).get(key) if type(live) is type(stored) else None
            self.visit(item, own, like=like, from_whole=from_whole, path=str(key))

    def fill(self, target: torch.Tensor, stored: Any, path: str) -> None:
        """Note that `target`'s part of `stored` is to be copied into it."""
        local, offset = _local(target, f"{self._where}: {path}")
        if local.is_meta and local.numel():
            raise CheckpointError(
                f"{self._where}: {path} has no memory to restore into: it is on the meta device.",
                hint="Give it some first: model.to_empty(device=...).",
            )
        size = tuple(local.shape)
        if 0 in size:
            return
        if isinstance(stored, StoredTensor):
            self._copies.append((local, stored.find(offset, size)))
        else:
            self._copies.append((local, [((0,) * len(size), cut(stored, offset, size))]))

    def _fits(self, live: Any, stored: Any, like: Any, path: str) -> bool:
        return (
            (type(live) is torch.Tensor or is_sharded(live))
            and live.layout is torch.strided
            and live.shape == stored.shape
            and live.dtype == stored.dtype
            and not (is_sharded(live) and any(placement.is_partial() for placement in live.placements))
            and (like is None or path == "step" or live.device == like.device)
            and _address(live) not in self._taken
        )


def _fresh(stored: Any, live: Any, like: Any, from_whole: bool, path: str) -> torch.Tensor:
    """A tensor of its own for `stored`: spread as the one it takes the place of, or as its parameter.

    State of a parameter that has another shape than it is the same on all ranks, as torch's DTensors make it.
    """
    if not isinstance(stored, StoredTensor) and (path == "step" or not stored.dim()):
        return torch.empty_like(stored)
    for example in (live, like):
        if is_sharded(example) and example.shape == stored.shape:
            return torch.empty_like(example.detach(), dtype=stored.dtype)
    if is_sharded(like) and (from_whole or isinstance(stored, StoredTensor)):
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor import empty as empty_sharded

        mesh = like.device_mesh
        return empty_sharded(stored.shape, dtype=stored.dtype, device_mesh=mesh, placements=[Replicate()] * mesh.ndim)
    device = like.device if like is not None and path != "step" else None
    return torch.empty(stored.shape, dtype=stored.dtype, device=device)


def _local(tensor: Any, path: str) -> tuple[torch.Tensor, tuple[int, ...]]:
    """This rank's memory of a tensor, and where in the whole it begins."""
    if not is_sharded(tensor):
        return tensor.detach(), (0,) * tensor.dim()
    piece = piece_of(tensor, path)
    return piece.local.detach(), piece.offset


def _address(tensor: Any) -> int | None:
    local = tensor.to_local() if is_sharded(tensor) else tensor
    return local.data_ptr() if local.numel() and not local.is_meta else None


def _items(state: Any) -> Iterator[tuple[Any, Any]]:
    """What a container holds, by key or position."""
    if isinstance(state, Mapping):
        yield from state.items()
    elif isinstance(state, list | tuple | deque | set | frozenset):
        yield from enumerate(state)


def _tensors_in(state: Any) -> Iterator[Any]:
    if isinstance(state, torch.Tensor | StoredTensor):
        yield state
    for _, item in _items(state):
        yield from _tensors_in(item)
