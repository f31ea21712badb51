"""What the ranks agree on. Every rank must make the same calls in the same order.

Messages go over a gloo group of their own where training uses another backend: they are small, and must neither wait
for the device nor run among its kernels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

_group: Any = None


def start() -> None:
    """Once on every rank, when the process group is there."""
    global _group
    _group = dist.new_group(backend="gloo") if dist.is_initialized() and dist.get_backend() != "gloo" else None


def broadcast(value: Any) -> Any:
    """Rank 0's `value`, on every rank. Without a process group: `value` itself."""
    if not _is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_group)
    return box[0]


def broadcast_number(value: int) -> int:
    """Rank 0's whole number, on every rank: the cheapest message there is."""
    if not _is_distributed():
        return value
    number = torch.tensor([value])
    dist.broadcast(number, src=0, group=_group)
    return int(number.item())


def greatest(value: int) -> int:
    """The greatest `value` of all ranks, on every rank."""
    if not _is_distributed():
        return value
    number = torch.tensor([value])
    dist.all_reduce(number, op=dist.ReduceOp.MAX, group=_group)
    return int(number.item())


def all_true(value: bool) -> bool:
    """Whether `value` is true on every rank."""
    return greatest(0 if value else 1) == 0


def _is_distributed() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1
