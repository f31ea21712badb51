"""Tensors of which each rank holds a part (DTensor, as FSDP2 makes them): which part, and whether to store it."""

from __future__ import annotations

import sys
import zlib
from functools import lru_cache
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
    """This rank's part of a DTensor. Ranks that hold replicas of a part store it in turn, by `path`.

    Sends no message. Raises CheckpointError for a placement that can't be stored (partial sums).
    """
    mesh, placements = value.device_mesh, tuple(value.placements)
    if any(placement.is_partial() for placement in placements):
        raise CheckpointError(
            f"{path} is a DTensor placed as {placements}; only shards and replicas can be stored.",
            hint="Redistribute it first: tensor.redistribute(placements=[Shard(0)]).",
        )
    whole = tuple(value.shape)
    with torch.no_grad():
        local = value.to_local()
    coordinate = mesh.get_coordinate()
    if coordinate is None:  # the mesh is of other ranks
        return Piece(local, (0,) * len(whole), whole, False)
    copies, mine = 1, 0
    for size, place, placement in zip(mesh.shape, coordinate, placements, strict=True):
        if placement.is_replicate():
            copies, mine = copies * size, mine * size + place
    return Piece(local, _offset(whole, mesh, placements), whole, zlib.crc32(path.encode()) % copies == mine)


@lru_cache(maxsize=1024)
def _offset(whole: tuple[int, ...], mesh: Any, placements: tuple[Any, ...]) -> tuple[int, ...]:
    """Kept from save to save: torch lists the indices of a sharded dimension to find the first."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return tuple(compute_local_shape_and_global_offset(whole, mesh, placements)[1])
