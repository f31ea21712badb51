"""Two checkpoints, state by state: every tensor and every value of every rank, bit for bit.

In: two checkpoints that are open for reading. Out: what was compared, and the paths of what differs.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ray_tracking.checkpoint.reader import OpenCheckpoint
from ray_tracking.testing.chaos.evidence import Difference

_SHOWN = 3


@dataclass(slots=True)
class _Count:
    tensors: int = 0
    size: int = 0
    values: int = 0
    differing: list[str] = field(default_factory=list)


def compare_states(expected: OpenCheckpoint, found: OpenCheckpoint) -> list[Difference]:
    """One Difference for each object of all ranks (model, optimizer, ...), and one for each rank's own of a name.

    A checkpoint of another world size, or with other objects, differs in them.
    """
    ranks = max(expected.info.world_size, found.info.world_size)
    return [_compare(what, expected, found, name, rank) for what, name, rank in _objects(expected, found, ranks)]


def _objects(expected: OpenCheckpoint, found: OpenCheckpoint, ranks: int) -> Iterator[tuple[str, str, int]]:
    """(as it is called, object, rank), rank 0's first."""
    named = [set[str]() for _ in range(ranks)]
    for opened in (expected, found):
        for rank in range(opened.info.world_size):
            named[rank] |= set(opened.saved_by(rank))
    own = set().union(*named[1:]) if ranks > 1 else set[str]()
    for rank, names in enumerate(named):
        for name in sorted(names):
            yield f"{name} of rank {rank}" if name in own else name, name, rank


def _compare(what: str, expected: OpenCheckpoint, found: OpenCheckpoint, name: str, rank: int) -> Difference:
    states = []
    for opened, side in ((expected, "the undisturbed run"), (found, "the killed run")):
        if rank >= opened.info.world_size or name not in opened.saved_by(rank):
            return Difference(what, 0, "tensors", changed=1, examples=(f"{side} did not save it",))
        states.append(opened.state(name, rank, copy=False))
    count = _Count()
    _walk(states[0], states[1], name, count)
    unit = "tensors" if count.tensors else "values"
    return Difference(
        what,
        count.tensors or count.values,
        unit,
        changed=len(count.differing),
        size=count.size or None,
        examples=tuple(count.differing[:_SHOWN]),
    )


def _walk(was: Any, is_now: Any, path: str, count: _Count) -> None:
    if type(was) is not type(is_now):
        count.differing.append(f"{path} is {type(is_now).__name__} instead of {type(was).__name__}")
    elif isinstance(was, torch.Tensor):
        count.tensors += 1
        count.size += was.nbytes
        if not same_tensor(was, is_now):
            count.differing.append(f"{path} differs")
    elif isinstance(was, np.ndarray):
        _walk(torch.from_numpy(was.copy()), torch.from_numpy(is_now.copy()), path, count)
    elif isinstance(was, Mapping):
        if list(was) != list(is_now):
            count.differing.append(f"{path} has other keys")
            return
        for key in was:
            _walk(was[key], is_now[key], f"{path}.{key}", count)
    elif isinstance(was, list | tuple):
        if len(was) != len(is_now):
            count.differing.append(f"{path} has {len(is_now)} items instead of {len(was)}")
            return
        for index, (one, other) in enumerate(zip(was, is_now, strict=True)):
            _walk(one, other, f"{path}[{index}]", count)
    else:
        count.values += 1
        if not _same_value(was, is_now):
            count.differing.append(f"{path} is {is_now!r:.40} instead of {was!r:.40}")


def same_tensor(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal in kind, shape and every bit: unlike for `torch.equal`, NaN is itself and -0.0 is not 0.0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other)))


def _same_value(one: Any, other: Any) -> bool:
    if isinstance(one, float):
        return struct.pack("<d", one) == struct.pack("<d", other) or (math.isnan(one) and math.isnan(other))
    return bool(one == other)
