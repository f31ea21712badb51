"""How an epoch is dealt to the ranks: pure arithmetic on positions.

The ranks take an epoch in global batches, each rank its part, so that a position is one number: how many units of the
epoch all ranks have consumed together. A unit is a sample, or a batch where a batch sampler makes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload


@dataclass(frozen=True, slots=True)
class GlobalBatches(Sequence[tuple[int, int]]):
    """The (begin, end) of the global batches left of `units` after `consumed` of them; nothing is stored.

    Each is `size` long. A rest that has a unit for every rank is a batch of its own; a smaller one goes into the batch
    before it, since every rank must take part in every step (not with `joins=False`: then some units are given to
    several ranks); `drop_last` leaves a rest out.
    """

    units: int
    consumed: int
    size: int
    world_size: int
    drop_last: bool = False
    joins: bool = True

    def __len__(self) -> int:
        full, rest = divmod(max(0, self.units - self.consumed), self.size)
        joined = self.joins and rest < self.world_size and full > 0
        return full if rest == 0 or self.drop_last or joined else full + 1

    @overload
    def __getitem__(self, index: int) -> tuple[int, int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[int, int]]: ...
    def __getitem__(self, index: int | slice) -> tuple[int, int] | list[tuple[int, int]]:
        count = len(self)
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(count))]
        if not 0 <= index < count:
            raise IndexError(index)
        begin = self.consumed + index * self.size
        return begin, self.units if index == count - 1 and not self.drop_last else begin + self.size


def rank_part(begin: int, end: int, *, rank: int, world_size: int) -> range:
    """A rank's positions in a global batch: equal parts, the first ranks one more where it does not divide.

    With fewer positions than ranks (only at the end of a resumed epoch), the ranks beyond them repeat one.
    """
    count, more = divmod(end - begin, world_size)
    if count == 0 and rank >= more:
        return range(begin + rank % more, begin + rank % more + 1)
    first = begin + rank * count + min(rank, more)
    return range(first, first + count + (rank < more))


def batch_part(batches: Sequence[Sequence[Any]], *, rank: int, world_size: int) -> list[Any]:
    """A rank's samples of a step whose batches a batch sampler made: one batch each.

    With fewer batches than ranks (at the end of an epoch) a batch is split between its ranks.
    """
    mine = rank * len(batches) // world_size
    sharing = [other for other in range(world_size) if other * len(batches) // world_size == mine]
    batch = batches[mine]
    part = rank_part(0, len(batch), rank=sharing.index(rank), world_size=len(sharing))
    return [batch[position] for position in part]
