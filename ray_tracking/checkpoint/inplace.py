"""Putting a stored state into live objects: straight from the files, each byte copied once and read once if it can be.

In: live objects with `load_state_dict()`, an `OpenCheckpoint` or a loaded checkpoint. Out: the objects, changed in
place, none of which holds a tensor of the files or of the loaded checkpoint afterwards. For the training thread.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch

from ray_tracking.checkpoint.copying import copy_all
from ray_tracking.checkpoint.direct import after_damage, plan_direct, read_directly
from ray_tracking.checkpoint.distributed_load import sharded_load, stand_ins
from ray_tracking.checkpoint.fitting import UNFIT, fitted, is_plain_optimizer
from ray_tracking.checkpoint.loaded import TrainingCheckpoint
from ray_tracking.checkpoint.reader import Local, OpenCheckpoint
from ray_tracking.checkpoint.rng import restore_rng
from ray_tracking.checkpoint.state import RNG, unwrap
from ray_tracking.checkpoint.tensor_views import private_copies
from ray_tracking.checkpoint.unread import Want
from ray_tracking.errors import CheckpointError, UsageError
from ray_tracking.log import get_logger

_EXTRA_STATE = "_extra_state"  # the end of the key of what a module gives from get_extra_state()
_log = get_logger()


def load_into(objects: Mapping[str, Any], opened: OpenCheckpoint, **options: Any) -> None:
    """Put the stored states into `objects`, in place (None is left out); other states of the checkpoint are ignored.

    All that can be is checked before the first object changes: CheckpointError names a missing object or the parameters
    that do not fit. CheckpointCorruptError names a file that is not what was saved. Nothing changes then either, or, if
    it was found while plain files were read straight into the objects, every tensor that was written to is spoilt: it
    holds NaN, and the error says so. `options`: see `prepare_load`.
    """
    prepare_load(objects, opened, **options)()


def prepare_load(
    objects: Mapping[str, Any],
    opened: OpenCheckpoint,
    *,
    rank: int = 0,
    world_size: int | None = None,
    rng: bool = True,
    local: Local | None = None,
) -> Callable[[], None]:
    """`load_into` up to where the first object changes. What it returns does the rest, before `opened` is closed.

    `rank` of `world_size` (that of the save, if None) is who restores. At another world size the objects that each
    rank has of its own are rank 0's; with `rng` the random states of the same rank are set last, if it was there.
    Of sharded tensors a rank reads the parts that its own DTensors hold. `local` gives something else that stands for
    one (see `OpenCheckpoint.state`).
    """
    info = opened.info
    source = rank if world_size in (None, info.world_size) else 0
    where = f"The checkpoint of step {info.step} ({opened.path})"
    wanted = _wanted(objects, [name for name in opened.names(source) if name != RNG], where)
    own_rng = rng and rank < info.world_size and RNG in opened.names(rank)

    def verified() -> Callable[[], None]:
        opened.prefetch(wanted, source)
        states = {
            name: opened.state(name, source, copy=False, local=local or stand_ins(opened, name, source))
            for name in wanted
        }
        random_states = opened.state(RNG, rank) if own_rng else None
        loads = _loads(wanted, states, where)

        def load() -> None:
            _put(loads, where)
            _put_rng(rng, random_states, info.step)

        return load

    wants: dict[str, Want] = {name: (name, source) for name in wanted}
    if own_rng:
        wants[RNG] = RNG, rank
    unread = None if local else plan_direct(wanted, wants, opened, where)
    if unread is None:
        return verified()

    def load_directly() -> None:
        if not read_directly(unread):
            after_damage(verified, unread, wanted)()
            return
        states = {name: unread.state(want) for name, want in wants.items()}
        random_states = states.pop(RNG, None) if own_rng else None
        _put(
            {
                name: partial(value.load_state_dict, fitted(value, states[name], f"{where}: {name!r}"))
                for name, value in wanted.items()
            },
            where,
        )
        _put_rng(rng, random_states, info.step)

    return load_directly


def restore(checkpoint: TrainingCheckpoint, objects: Mapping[str, Any], *, rng: bool = True) -> None:
    """`load_into` from a checkpoint in memory, which can be used again."""
    where = f"The checkpoint of step {checkpoint.step} ({checkpoint.path})"
    wanted = _wanted(objects, checkpoint.objects, where)
    _put(_loads(wanted, {name: checkpoint.objects[name] for name in wanted}, where), where)
    _put_rng(rng, checkpoint.rng, checkpoint.step)


def _wanted(objects: Mapping[str, Any], stored: Any, where: str) -> dict[str, Any]:
    """The objects to load, unwrapped."""
    wanted = {name: unwrap(value) for name, value in objects.items() if value is not None}
    for name, value in wanted.items():
        if name not in stored:
            raise CheckpointError(
                f"{where} has no state for {name!r}; it holds: {', '.join(sorted(stored)) or 'nothing'}.",
                hint=f"Restore without {name}=, or save it with the checkpoint.",
            )
        if not hasattr(value, "load_state_dict"):
            raise UsageError(f"{name!r} is a {type(value).__name__} without load_state_dict(): it can't be restored.")
    return wanted


def _loads(wanted: Mapping[str, Any], states: Mapping[str, Any], where: str) -> dict[str, Callable[[], object]]:
    """What puts each state into its object. All that can be is checked when this returns."""
    loads: dict[str, Callable[[], object]] = {}
    for name, value in wanted.items():
        here = f"{where}: {name!r}"
        state = fitted(value, states[name], here)
        loads[name] = sharded_load(value, state, wanted, here) or partial(_load, value, state)
    return loads


def _load(value: Any, state: Any) -> None:
    value.load_state_dict(_own_state(value, state))


def _put(loads: Mapping[str, Callable[[], object]], where: str) -> None:
    for name, load in loads.items():
        try:
            load()
        except UNFIT as error:
            raise CheckpointError(f"{where}: {name!r} could not take its state: {error}") from error


def _put_rng(wanted: bool, state: Mapping[str, Any] | None, step: int) -> None:
    if wanted and state is not None:
        restore_rng(state)
    elif wanted:
        _log.warning("random states left as they are: the checkpoint has none for this rank", step=step)


def _own_state(value: Any, state: Any) -> Any:
    """`state` with tensors that `value` may keep and change, where it does more than copy them."""
    if isinstance(value, torch.nn.Module):
        kept = {key: _private(item) for key, item in state.items() if str(key).endswith(_EXTRA_STATE)}
        if not kept:
            return state
        replaced = copy.copy(state)  # with the modules' versions, which ride on it
        replaced.update(kept)
        return replaced
    return _for_optimizer(value, state) if is_plain_optimizer(value) else _private(state)


def _private(state: Any, known: dict[int, Any] | None = None) -> Any:
    """A deep copy. `known`: by id of a tensor what stands for it in the copy."""
    memo = dict(known or {})
    others = {id(tensor): tensor for tensor in _tensors_in(state) if id(tensor) not in memo}
    memo.update(zip(others, private_copies(others.values()), strict=True))
    return copy.deepcopy(state, memo)


def _tensors_in(state: Any) -> Iterator[torch.Tensor]:
    """The plain tensors in containers; whatever else there is, is left to deepcopy."""
    if type(state) is torch.Tensor:
        if state.layout is torch.strided and not state.requires_grad:
            yield state
    elif isinstance(state, Mapping):
        for item in state.values():
            yield from _tensors_in(item)
    elif isinstance(state, (list, tuple, set, frozenset)):
        for item in state:
            yield from _tensors_in(item)


# -- optimizers ------------------------------------------------------------------------------------


def _for_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> Any:
    """`state` with the optimizer's own tensors in it, already filled: load_state_dict keeps those that fit as they are.

    So a resumed optimizer costs one copy and no memory. What it has no tensor for yet gets one.
    """
    parameters = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
    saved_ids = list(chain.from_iterable(group["params"] for group in state["param_groups"]))
    taken = {parameter.data_ptr() for parameter in parameters}
    known: dict[int, Any] = {}
    copies: list[tuple[torch.Tensor, torch.Tensor]] = []
    for saved_id, parameter in zip(saved_ids, parameters, strict=True):
        stored, live = state["state"].get(saved_id), optimizer.state.get(parameter, {})
        if not isinstance(stored, Mapping):
            continue
        for key, tensor in stored.items():
            if type(tensor) is not torch.Tensor or id(tensor) in known:
                continue
            target: Any = live.get(key) if isinstance(live, Mapping) else None
            if _fits(target, tensor, parameter, key) and target.data_ptr() not in taken:
                taken.add(target.data_ptr())
                known[id(tensor)] = target
                copies.append((target, tensor))
            elif key != "step" and parameter.device != tensor.device:
                known[id(tensor)] = tensor  # load_state_dict moves it to the parameter's device, which is a copy
    with torch.no_grad():
        copy_all(copies)
    return _private(state, known)


def _fits(target: Any, tensor: torch.Tensor, parameter: torch.Tensor, key: Any) -> bool:
    """Whether `target`, filled, is what load_state_dict would make of `tensor`."""
    return (
        type(target) is torch.Tensor
        and target.layout is torch.strided
        and target.numel() > 0
        and target.shape == tensor.shape
        and target.dtype == tensor.dtype
        and (target.device == tensor.device or (key != "step" and target.device == parameter.device))
    )
