"""Batches of a map-style dataset (`__len__` and `__getitem__`) from a position on, one rank's part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset, default_collate, default_convert

from ray_tracking.errors import UsageError
from ray_tracking.log import get_logger
from ray_tracking.runtime.loading.dealing import GlobalBatches, batch_part, rank_part
from ray_tracking.runtime.loading.place import Handed, Place
from ray_tracking.runtime.loading.sampling import FromSampler, Order, as_list, digest
from ray_tracking.runtime.loading.seeding import OwnRandom, seed_for, seed_generators
from ray_tracking.runtime.loading.torchloader import Tasks, build, start_seed

log = get_logger()


class MappedSource:
    """`batch_size` None without a batch sampler: a step is one item of the dataset, not collated."""

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None,
        order: Order,
        *,
        rank: int,
        world_size: int,
        drop_last: bool,
        collate: Any,
        options: dict[str, Any],
    ) -> None:
        self.kind = order.kind
        self.unit = "batches" if order.batches else "samples"
        self.samples: int | None = len(dataset)
        self._order = order
        self._single = batch_size is None and not order.batches
        self._dealer = _Dealer(rank, world_size, batches=order.batches, single=self._single)
        self._size = world_size * (batch_size or 1)
        self._rank = rank
        self._world_size = world_size
        self._drop_last = drop_last
        self._told = False
        self._tasks = Tasks()
        self._loader = build(_Fetch(dataset, collate, single=self._single), self._tasks, options)
        self._check()

    def __len__(self) -> int:
        return len(self._dealt(len(self._order), 0))

    def open(self, place: Place) -> Iterator[Handed]:
        order = self._order.draw(place)
        left = self._dealt(len(order), place.consumed)
        marks = self._marks(place, order)
        dealer = self._dealer
        # A loader that its own tasks refer to would be freed by the collector of cycles only, in whose hands torch
        # takes seconds to end worker processes.
        self._tasks.make = lambda: (dealer.task(place, order, begin, end) for begin, end in left)
        start_seed(self._loader, seed_for(place.seed, place.epoch, place.turn, "workers", self._rank))
        for number, ((begin, end), batch) in enumerate(zip(left, self._loader, strict=True), start=1):
            if end - begin < self._world_size and not self._order.batches:
                self._tell_repeated(end - begin)
            yield Handed(batch, end, number == len(left), marks)

    def _dealt(self, units: int, consumed: int) -> GlobalBatches:
        joins = not (self._single or self._order.batches)
        return GlobalBatches(units, consumed, self._size, self._world_size, self._drop_last, joins)

    def _marks(self, place: Place, order: Any) -> dict[str, Any]:
        if not isinstance(self._order, FromSampler):
            return {}
        now = digest(order)
        if place.marks.get("digest", now) != now and self._rank == 0:
            log.warning(
                "the sampler gives another order than before the interruption: samples of this epoch may be missed "
                "or given twice",
                sampler=self.kind,
            )
        return {"digest": now}

    def _tell_repeated(self, samples: int) -> None:
        if not self._told and self._rank == 0:
            log.warning(
                "fewer samples than ranks are left for the epoch's last step: some ranks are given one of another's",
                samples=samples,
                ranks=self._world_size,
            )
        self._told = True

    def _check(self) -> None:
        try:
            units = len(self._order)
        except TypeError:
            return  # a sampler that does not say how many it gives
        needed = self._size if self._drop_last else 1 if self._order.batches else self._world_size
        if units < needed:
            raise UsageError(
                f"The dataset has {units} {self.unit}; {self._world_size} workers need at least {needed}.",
                hint="Use fewer workers (scaling.workers), or smaller batches.",
            )


@dataclass(frozen=True, slots=True)
class _Dealer:
    rank: int
    world_size: int
    batches: bool
    single: bool

    def task(self, place: Place, order: Any, begin: int, end: int) -> tuple[int, Any]:
        """The seed and the indices of this rank's batch."""
        if self.batches:
            first = begin + self.rank
            indices = batch_part(order[begin:end], rank=self.rank, world_size=self.world_size)
        else:
            part = rank_part(begin, end, rank=self.rank, world_size=self.world_size)
            first, indices = part.start, as_list(order[part.start : part.stop])
        seed = seed_for(place.seed, place.epoch, place.turn, "batch", first)
        return seed, indices[0] if self.single else indices


class _Fetch(Dataset[Any]):
    """The dataset a DataLoader sees, in the training process or a worker's. A task is (seed, indices)."""

    def __init__(self, dataset: Any, collate: Any, *, single: bool) -> None:
        self.dataset = dataset
        self._single = single
        self._collate = collate or (default_convert if single else default_collate)
        self._random = OwnRandom(goes_on=False)

    def __getitem__(self, task: tuple[int, Any]) -> Any:
        seed, wanted = task
        with self._random:
            seed_generators(seed)
            return self._collate(self._items(wanted))

    def _items(self, wanted: Any) -> Any:
        if self._single:
            return self.dataset[wanted]
        if getattr(self.dataset, "__getitems__", None):
            return self.dataset.__getitems__(wanted)
        return [self.dataset[index] for index in wanted]
