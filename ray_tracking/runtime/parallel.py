"""How a model is spread over the ranks: whole on each (DistributedDataParallel) or in shards (FSDP2).

In: a model, alike on all ranks but for its weights. Out: one that all ranks train together, with rank 0's weights.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ray_tracking.errors import UsageError

Parallel = Literal["ddp", "fsdp"]
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def parallelize(
    model: nn.Module, device: torch.device, world_size: int, parallel: Parallel | None, **options: Any
) -> nn.Module:
    """The model on `device`, for all ranks together; all ranks must call it. `options` go to DistributedDataParallel
    or to every fully_shard.
    """
    if parallel not in ("ddp", "fsdp", None):
        raise UsageError(f"A model can't be spread by {parallel!r}.", hint='Use "ddp", "fsdp" or None.')
    if parallel == "fsdp" and dist.is_initialized():
        return _sharded(model, device, world_size, **options)
    model = model.to(device)
    if parallel is None or world_size == 1 or not any(p.requires_grad for p in model.parameters()):
        return model
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None, **options)


def without_exchange(model: nn.Module) -> AbstractContextManager[None]:
    """For gradient accumulation: no gradient is exchanged inside."""
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return _unsynchronized(model) if fsdp is not None and isinstance(model, fsdp.FSDPModule) else nullcontext()


@contextmanager
def _unsynchronized(model: Any) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The modules whose weights are gathered together: those that stand several times in a container, as layers do.

    Outermost ones, of a class that occurs there at least twice and has modules inside: not single linear layers.
    """
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for container in model.modules():  # the outer ones come first
        if container in inside or not isinstance(container, _CONTAINERS):
            continue
        children = list(dict.fromkeys(container.children()))
        often = Counter(map(type, children))
        for child in children:
            compound = not isinstance(child, _CONTAINERS) and next(child.children(), None) is not None
            if often[type(child)] > 1 and compound and child not in inside:
                found.append(child)
                inside.update(child.modules())
    return found


def _sharded(model: nn.Module, device: torch.device, world_size: int, **options: Any) -> nn.Module:
    """One block after the other, so that no device holds more than one of them whole beside its shards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers())):
        raise UsageError(
            "The model is on the meta device: there are no weights that all ranks could start from.",
            hint="Build it with weights, or call torch.distributed.fsdp.fully_shard, to_empty() and its "
            "initialization yourself.",
        )
    options.setdefault("mesh", init_device_mesh(device.type, (world_size,)))
    sent: set[int] = set()
    for part in (*(block for block in blocks_of(model) if _owns_its_weights(block, model)), model):
        _share_weights(part, device, sent)
        fully_shard(part, **options)
    return model


def _owns_its_weights(block: nn.Module, model: nn.Module) -> bool:
    """Whether no weight of the block is tied to one outside of it, which would come apart when they are sharded."""
    used = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    inside = Counter(id(parameter) for _, parameter in block.named_parameters(remove_duplicate=False))
    return all(used[key] == count for key, count in inside.items())


def _share_weights(module: nn.Module, device: torch.device, sent: set[int]) -> None:
    """Rank 0's parameters and buffers to all ranks, but for those `sent` before, and those that are shards by now."""
    for tensor in chain(module.parameters(), module.buffers()):
        if type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer) or id(tensor) in sent:
            continue
        tensor.data = tensor.data.to(device).contiguous()
        dist.broadcast(tensor.data, src=0)
        sent.add(id(tensor))
