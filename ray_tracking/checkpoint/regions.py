"""Parts of tensors: a region of the whole, put together from the boxes that ranks stored. No I/O.

In: where each box begins, and the box itself when it is asked for. Out: a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

Index = Sequence[int]


def cut(whole: torch.Tensor, offset: Index, size: Index) -> torch.Tensor:
    """A view of the region. ValueError if it lies outside."""
    if not len(offset) == len(size) == whole.dim():
        raise ValueError(f"a region at {tuple(offset)} of {tuple(size)} of a tensor of {tuple(whole.shape)}")
    for dimension, (begin, length, most) in enumerate(zip(offset, size, whole.shape, strict=True)):
        if begin < 0 or length < 0 or begin + length > most:
            raise ValueError(f"a region at {tuple(offset)} of {tuple(size)} of a tensor of {tuple(whole.shape)}")
        whole = whole.narrow(dimension, begin, length)
    return whole


def assemble(
    places: Mapping[int, Index], piece: Callable[[int], torch.Tensor], offset: Index, size: Index
) -> torch.Tensor:
    """The region of `size` at `offset`, put together from its `parts`; a view if there is one part."""
    found = parts(places, piece, offset, size)
    if len(found) == 1 and tuple(found[0][1].shape) == tuple(size):
        return found[0][1]
    dtype = found[0][1].dtype if found else piece(next(iter(places))).dtype
    result = torch.empty(tuple(size), dtype=dtype)
    for begin, part in found:
        if part.dtype != dtype:
            raise ValueError(f"parts of a tensor have the dtypes {dtype} and {part.dtype}")
        cut(result, begin, part.shape).copy_(part)
    return result


def parts(
    places: Mapping[int, Index], piece: Callable[[int], torch.Tensor], offset: Index, size: Index
) -> list[tuple[Index, torch.Tensor]]:
    """The region of `size` at `offset` as views of the boxes, and where in it each begins.

    `places`: rank -> where its box begins, in the order they are to be tried. Asks `piece` for as few boxes as it can.
    ValueError if boxes overlap or leave a hole.
    """
    if any(len(place) != len(offset) for place in places.values()) or len(size) != len(offset):
        raise ValueError(
            f"a tensor's parts are at {[tuple(place) for place in places.values()]}, not at {tuple(offset)}"
        )
    wanted = math.prod(size)
    found: list[tuple[Index, torch.Tensor]] = []
    used: list[tuple[Index, Index]] = []
    filled = 0
    for rank in _likely_first(places, offset, size):
        if filled == wanted:
            break
        box, place = piece(rank), places[rank]
        if box.dim() != len(place):
            raise ValueError(f"a part of a tensor has the shape {tuple(box.shape)} at {tuple(place)}")
        begin = [max(have, want) for have, want in zip(place, offset, strict=True)]
        end = [
            min(have + length, want + count)
            for have, length, want, count in zip(place, box.shape, offset, size, strict=True)
        ]
        shape = [last - first for first, last in zip(begin, end, strict=True)]
        if any(length <= 0 for length in shape):
            continue
        part = cut(box, [first - have for first, have in zip(begin, place, strict=True)], shape)
        if part.numel() == wanted:
            return [((0,) * len(size), part)]
        if any(_overlap((begin, end), other) for other in used):
            raise ValueError(f"two parts of a tensor overlap at {tuple(begin)}")
        used.append((begin, end))
        found.append(([first - want for first, want in zip(begin, offset, strict=True)], part))
        filled += part.numel()
    if filled != wanted:
        raise ValueError(f"the parts of a tensor leave a hole in the region of {tuple(size)} at {tuple(offset)}")
    return found


def _likely_first(places: Mapping[int, Index], offset: Index, size: Index) -> list[int]:
    """Ranks whose box can touch the region: one that begins where it does, then those that begin last before its end.

    A box's size is known only when it is opened; boxes that begin late in the region end late as well.
    """
    can = [
        rank
        for rank, place in places.items()
        if all(have < want + length for have, want, length in zip(place, offset, size, strict=True))
    ]
    order = {rank: number for number, rank in enumerate(places)}
    return sorted(can, key=lambda rank: (list(places[rank]) != list(offset), [-at for at in places[rank]], order[rank]))


def _overlap(one: tuple[Index, Index], other: tuple[Index, Index]) -> bool:
    return all(max(a, b) < min(c, d) for a, b, c, d in zip(one[0], other[0], one[1], other[1], strict=True))
