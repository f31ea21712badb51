"""Restoring from files that are read once, straight into the live tensors: the memory copy that a restore can't avoid.

In: live modules and optimizers, an `OpenCheckpoint` of plain files on a local file system. Out: the objects, changed.
What a file holds is proven only when all of it is read, and by then the tensors are written to. So nothing else of an
object changes before all files are verified; and where one is damaged, `spoil` leaves no tensor half restored that
could pass for a good one. For the training thread.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch

from ray_tracking.checkpoint.distributed_state import has_shards
from ray_tracking.checkpoint.fitting import fitted, is_plain_optimizer
from ray_tracking.checkpoint.mapping import NotThatFileError
from ray_tracking.checkpoint.reader import DAMAGE, OpenCheckpoint
from ray_tracking.checkpoint.unread import UnreadStates, Want
from ray_tracking.errors import RayTrackingError
from ray_tracking.log import get_logger

_FEW = 1 << 16
"""Bytes of tensors that may take a copy more: odd ones, of which a module has few."""
_TYPES = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
_Span = tuple[int, int]
_log = get_logger()


def plan_direct(
    wanted: Mapping[str, Any], wants: Mapping[str, Want], opened: OpenCheckpoint, where: str
) -> UnreadStates | None:
    """The states, to be read straight into the objects; None where that can't be done, or does not look possible."""
    if any(map(has_shards, wanted.values())):
        return None
    try:
        unread = UnreadStates(opened, wants.values())
        drafts = {name: unread.draft(want) for name, want in wants.items()}
        targets = Targets(unread)
        for name, value in wanted.items():
            state = fitted(value, drafts[name], f"{where}: {name!r}")
            if isinstance(value, torch.nn.Module) and not targets.add_module(value, state):
                return None
            if is_plain_optimizer(value) and not targets.add_optimizer(value, state):
                return None
    except (*DAMAGE, MemoryError, RayTrackingError):  # nothing is proven yet: what verifies first says what is wrong
        return None
    return unread


def read_directly(unread: UnreadStates) -> bool:
    """Whether all of it is what was saved. If not, or after an error, the tensors that were read into are spoilt."""
    good = False
    try:
        good = unread.read()
    except (RayTrackingError, NotThatFileError) as error:
        _log.warning("reading straight into the objects failed; the files are read anew", reason=str(error))
    finally:
        if not good:
            spoil(unread.filled)
    return good


def after_damage(
    verified: Callable[[], Callable[[], None]], unread: UnreadStates, names: Iterable[str]
) -> Callable[[], None]:
    """What verifies first knows the file, and may have another copy of it."""
    try:
        return verified()
    except RayTrackingError as error:
        if not unread.filled:
            raise
        raise type(error)(
            f"{error.message} It was found while {', '.join(names)} was read into: the tensors hold NaN now.",
            hint=error.hint or "Restore another checkpoint into the same objects, or build them anew.",
        ) from error


class Targets:
    """The live memory that a restore fills, none of it twice."""

    def __init__(self, unread: UnreadStates) -> None:
        self._unread = unread
        self._taken: list[_Span] = []

    def add_module(self, module: torch.nn.Module, state: Mapping[str, Any]) -> bool:
        """`state`: a draft, by the module's own names. False if too much of it would be copied once more."""
        if not _loads_as_torch_does(module):
            return False
        named = chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
        live = dict(named)
        copied = 0
        for key, stored in state.items():
            if isinstance(stored, torch.Tensor) and not self._add(stored, live.get(key)):
                copied += stored.nbytes if self._unread.can_be_put(stored) else 0
        return copied <= _FEW

    def add_optimizer(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> bool:
        """`state`: a draft. The tensors that it has none for yet it gets with the state. False if there is a copy."""
        parameters = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
        saved_ids = list(chain.from_iterable(group["params"] for group in state["param_groups"]))
        if any(type(parameter) not in _TYPES or parameter.device.type != "cpu" for parameter in parameters):
            return False
        own = {_span(parameter)[0] for parameter in parameters}
        for saved_id, parameter in zip(saved_ids, parameters, strict=True):
            stored, live = state["state"].get(saved_id), optimizer.state.get(parameter)
            if not isinstance(stored, Mapping) or not isinstance(live, Mapping):
                continue
            for key, tensor in stored.items():
                target = live.get(key)
                if type(tensor) is not torch.Tensor or type(target) is not torch.Tensor:
                    continue
                if not target.is_contiguous():
                    return False
                if target.data_ptr() not in own:  # some optimizers keep the parameter itself in their state
                    self._add(tensor, target)
        return True

    def _add(self, stored: torch.Tensor, live: Any) -> bool:
        if not _takes(live, stored) or not self._unread.can_be_put(stored):
            return False
        begin, end = _span(live)
        at = bisect_left(self._taken, (begin, end))
        if any(first < end and begin < last for first, last in self._taken[max(at - 1, 0) : at + 1]):
            return False  # two names of one memory: what is loaded last is to stay
        insort(self._taken, (begin, end))
        self._unread.put_into(stored, live)
        return True


def spoil(tensors: Iterable[torch.Tensor]) -> None:
    """Put NaN, or of whole numbers the least, into tensors that hold unproven bytes: whoever uses them notices."""
    with torch.no_grad():
        for tensor in tensors:
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.fill_(float("nan"))
            elif tensor.dtype == torch.bool:
                tensor.zero_()
            else:
                tensor.fill_(torch.iinfo(tensor.dtype).min)


def _loads_as_torch_does(module: torch.nn.Module) -> bool:
    """Whether loading a state is copying it, tensor by tensor, and nobody hooks into that."""
    if has_shards(module) or torch.__future__.get_swap_module_params_on_conversion():
        return False
    return type(module).load_state_dict is torch.nn.Module.load_state_dict and all(
        type(each)._load_from_state_dict.__module__.startswith("torch.nn.modules.")
        and not each._load_state_dict_pre_hooks
        and "load_state_dict" not in vars(each)
        and "_load_from_state_dict" not in vars(each)
        for each in module.modules()
    )


def _takes(live: Any, stored: torch.Tensor) -> bool:
    """Whether bytes of `stored` in the memory of `live` are its value."""
    return (
        type(live) in _TYPES
        and live.layout is torch.strided
        and live.device.type == "cpu"
        and live.shape == stored.shape
        and live.dtype == stored.dtype
        and live.is_contiguous()
        and live.numel() > 0
        and not (live.is_conj() or live.is_neg() or live.is_inference() or live.is_quantized)
    )


def _span(tensor: torch.Tensor) -> _Span:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
