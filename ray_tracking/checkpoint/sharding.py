"""Tensors of which each rank holds a part (DTensor, as FSDP2 makes them): which part, and whether to store it."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch

from ray_tracking.errors import CheckpointError


class Piece(NamedTuple):
    """This rank's part of a tensor of shape `whole`: `local` begins at `offset` (one number per dimension).

    `stored` is False on all but one of the ranks that hold the same part.
    """

    local: torch.Tensor
    offset: tuple[int, ...]
    whole: tuple[int, ...]
    stored: bool


def is_sharded(value: Any) -> bool:
    """Whether it is a DTensor; does not import torch.distributed.tensor to find out."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def piece_of(value: Any, path: str) -> Piece:
    """Raises CheckpointError for a placement that can't be stored (partial sums)."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = value.device_mesh, value.placements
    if not all(isinstance(placement, Shard | Replicate) for placement in placements):
        raise CheckpointError(
            f"{path} is a DTensor placed as {placements}; only shards and replicas can be stored.",
            hint="Redistribute it first: tensor.redistribute(placements=[Shard(0)]).",
        )
    _, offset = compute_local_shape_and_global_offset(value.shape, mesh, placements)
    coordinate = mesh.get_coordinate() or [0] * len(placements)
    first = all(
        place == 0 for place, placement in zip(coordinate, placements, strict=True) if isinstance(placement, Replicate)
    )
    return Piece(value.to_local(), tuple(offset), tuple(value.shape), first)
