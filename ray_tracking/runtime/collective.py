"""What the ranks agree on: values that rank 0 decides. Every rank must make the same calls in the same order."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def broadcast(value: Any) -> Any:
    """Rank 0's `value`, on every rank. Without a process group: `value` itself."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_true(value: bool) -> bool:
    """Whether `value` is true on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    flag = torch.tensor([int(value)], device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())
