"""A data loader sharded by rank that can be resumed inside an epoch, also at another world size.

The order of an epoch is a permutation drawn from (seed, epoch) alone. The ranks take it in global batches, each
rank its part, so that a position is one number: how many samples of the epoch all ranks have consumed together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ray_tracking.errors import UsageError

_NEXT_EPOCH = 1_000_003
"""A prime that keeps the seeds of epochs apart."""


def epoch_order(samples: int, *, seed: int, epoch: int, shuffle: bool) -> torch.Tensor:
    """The sample indices of an epoch in order: [samples], int64."""
    if not shuffle:
        return torch.arange(samples)
    return torch.randperm(samples, generator=torch.Generator().manual_seed(seed * _NEXT_EPOCH + epoch))


def global_batches(
    samples: int, consumed: int, *, batch_size: int, world_size: int, drop_last: bool
) -> list[tuple[int, int]]:
    """The (begin, end) of the global batches left after `consumed` samples.

    Each is `batch_size * world_size` long. A rest that has a sample for every rank is a batch of its own; a smaller one
    goes into the batch before it, since every rank must take part in every step; `drop_last` leaves a rest out.
    """
    size = batch_size * world_size
    starts = list(range(consumed, samples, size))
    batches = [(begin, min(begin + size, samples)) for begin in starts]
    if batches and (rest := batches[-1][1] - batches[-1][0]) < size:
        if drop_last:
            batches.pop()
        elif rest < world_size and len(batches) > 1:
            batches[-2:] = [(batches[-2][0], samples)]
    return batches


def rank_part(begin: int, end: int, *, rank: int, world_size: int) -> range:
    """A rank's positions in a global batch: equal parts, the first ranks one more where it does not divide.

    With fewer samples than ranks (only at the end of a resumed epoch), the ranks beyond them repeat one.
    """
    count, more = divmod(end - begin, world_size)
    if count == 0 and rank >= more:
        return range(begin + rank % more, begin + rank % more + 1)
    first = begin + rank * count + min(rank, more)
    return range(first, first + count + (rank < more))


class ResumableLoader:
    """What `run.loader` returns. Iterating gives the batches left in the current epoch.

    `state_dict()` is {epoch, consumed, seed}; it is the same on every rank.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        *,
        shuffle: bool,
        seed: int,
        rank: int,
        world_size: int,
        drop_last: bool = False,
        **options: Any,
    ) -> None:
        _check(dataset, batch_size, world_size, drop_last, options)
        self.dataset = dataset
        self.batch_size = batch_size
        self.epoch = 0
        self.consumed = 0
        self._samples = len(dataset)  # type: ignore[arg-type]
        self._shuffle = shuffle
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._drop_last = drop_last
        self._options = options

    def __len__(self) -> int:
        """Steps in a whole epoch, from its beginning."""
        return len(self._batches(0))

    @property
    def finished(self) -> bool:
        """Whether the current epoch has no batches left."""
        return not self._batches(self.consumed)

    def begin_epoch(self, epoch: int) -> None:
        """Go to an epoch: its beginning, or the position inside it that was restored."""
        if epoch != self.epoch:
            self.epoch, self.consumed = epoch, 0

    def __iter__(self) -> Iterator[Any]:
        """The batches left. The position moves when a batch is handed out: who has a batch has consumed it."""
        left = self._batches(self.consumed)
        order = epoch_order(self._samples, seed=self._seed, epoch=self.epoch, shuffle=self._shuffle)
        mine = [
            order[list(rank_part(begin, end, rank=self._rank, world_size=self._world_size))].tolist()
            for begin, end in left
        ]
        # A generator of its own: DataLoader draws from it at each start, and a resumed epoch starts once more
        # than one that was never interrupted, which must not show in the model's random numbers.
        generator = torch.Generator().manual_seed(self._seed * _NEXT_EPOCH + self.epoch)
        batches = DataLoader(self.dataset, batch_sampler=mine, generator=generator, **self._options)
        for (_, end), batch in zip(left, batches, strict=True):
            self.consumed = end
            yield batch

    def _batches(self, consumed: int) -> list[tuple[int, int]]:
        return global_batches(
            self._samples,
            consumed,
            batch_size=self.batch_size,
            world_size=self._world_size,
            drop_last=self._drop_last,
        )

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "consumed": self.consumed, "seed": self._seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.consumed, self._seed = state["epoch"], state["consumed"], state["seed"]


def _check(dataset: Any, batch_size: int, world_size: int, drop_last: bool, options: dict[str, Any]) -> None:
    if isinstance(dataset, DataLoader):
        raise UsageError(
            "run.loader takes a dataset, not a DataLoader.",
            hint="Pass loader.dataset and the same options: run.loader(dataset, batch_size=64, shuffle=True).",
        )
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise UsageError(
            f"run.loader can't shard {type(dataset).__name__}: it has no length and no order to resume in.",
            hint="Give a map-style dataset (with __len__ and __getitem__).",
        )
    taken = {"sampler", "batch_sampler", "generator"} & options.keys()
    if taken:
        raise UsageError(f"run.loader does the sampling itself; {', '.join(sorted(taken))} can't be given.")
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; it must be at least 1 (per worker).")
    needed = batch_size * world_size if drop_last else world_size
    if len(dataset) < needed:
        raise UsageError(
            f"The dataset has {len(dataset)} samples; {world_size} workers need at least {needed}.",
            hint="Use fewer workers (scaling.workers), or smaller batches.",
        )
