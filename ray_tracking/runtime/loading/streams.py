"""Batches of an iterable dataset from a position on, one rank's part.

Every rank reads the whole stream in one process and keeps every world_size-th sample, so that the ranks agree without
a message; or the dataset is already split (`sharded`): then each rank reads its own part, in all its workers, and the
ranks agree before each step that all have one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from ray_tracking.errors import UsageError
from ray_tracking.log import get_logger
from ray_tracking.runtime.loading.dealing import GlobalBatches
from ray_tracking.runtime.loading.place import Handed, Place
from ray_tracking.runtime.loading.reading import IDLE, Ask, Item, Reader, Start
from ray_tracking.runtime.loading.seeding import seed_for
from ray_tracking.runtime.loading.torchloader import Tasks, build, start_seed

log = get_logger()


class StreamSource:
    """`batch_size` None: a step is one item of the stream, not collated. `agree`: whether something is so on all ranks.

    `shuffle_buffer`: samples that are shuffled among each other, all in memory; 0 keeps the stream's order.
    """

    unit = "samples"

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None,
        *,
        rank: int,
        world_size: int,
        drop_last: bool,
        collate: Any,
        shuffle_buffer: int,
        sharded: bool,
        agree: Callable[[bool], bool],
        options: dict[str, Any],
    ) -> None:
        self.kind = ("split stream" if sharded else "stream") + (
            f" shuffled by {shuffle_buffer}" * bool(shuffle_buffer)
        )
        self.samples: int | None = None
        self._dataset = dataset
        self._batch_size = batch_size
        self._drop_last = drop_last
        self._rank = rank
        self._world_size = world_size
        self._sharded = sharded
        self._agree = agree
        self._told = False
        workers = options.get("num_workers", 0)
        if workers > 1 and not sharded:
            options = {**options, "num_workers": 1}
            self._say("one worker reads the stream on each rank: more of them would each read all of it", asked=workers)
        elif world_size > 1 and not sharded:
            self._say("every rank reads the whole stream and keeps its part; sharded=True is for data that is split")
        self._workers = max(1, options.get("num_workers", 0))
        self._tasks = Tasks()
        reader = Reader(
            dataset,
            batch_size,
            rank=0 if sharded else rank,
            world_size=1 if sharded else world_size,
            drop_last=drop_last,
            collate=collate,
            shuffle_buffer=shuffle_buffer,
        )
        self._loader = build(reader, self._tasks, options)

    def __len__(self) -> int:
        """TypeError if the dataset does not know its length."""
        world_size = 1 if self._sharded else self._world_size
        size = world_size * (self._batch_size or 1)
        joins = self._batch_size is not None
        return len(GlobalBatches(len(self._dataset), 0, size, world_size, self._drop_last, joins))

    def open(self, place: Place) -> Iterator[Handed]:
        start_seed(self._loader, seed_for(place.seed, place.epoch, place.turn, "workers", self._rank))
        return self._split(place) if self._sharded else self._whole(place)

    def _say(self, event: str, **values: Any) -> None:
        if self._rank == 0:
            log.info(event, **values)

    # --- one stream for all ranks -----------------------------------------------------------------------------

    def _whole(self, place: Place) -> Iterator[Handed]:
        mark = place.marks.get("stream")
        if place.consumed and mark is None:
            self._say("the stream is read again up to the position: its dataset has no state", samples=place.consumed)
        start = Start((place.seed, place.epoch, place.turn), place.number, place.consumed, mark)
        self._tasks.make = lambda: itertools.chain([Ask(start)], itertools.repeat(Ask()))
        for item in self._loader:
            if item is None:
                return
            if item.repeated:
                self._tell_repeated()
            yield Handed(item.batch, item.consumed, item.last, {} if item.mark is None else {"stream": item.mark})
            if item.last:
                return

    def _tell_repeated(self) -> None:
        if not self._told:
            log.warning("fewer samples than ranks were left for the epoch's last step: this rank is given another's")
        self._told = True

    # --- a stream for each rank ----------------------------------------------------------------------------------

    def _split(self, place: Place) -> Iterator[Handed]:
        own = self._own(place)
        items = self._items(place, own)
        coming = next(items, None)
        more = self._agree(coming is not None)
        while more and coming is not None:
            (worker, item), coming = coming, next(items, None)
            more = self._agree(coming is not None)
            own = own.after(worker, item)
            yield Handed(item.batch, sum(own.counts) * self._world_size, not more, {"own": own.as_state()})
        if coming is not None and not self._told:
            self._told = True
            log.warning("another rank's part of the data ended first: the rest of this rank's is left out of the epoch")

    def _own(self, place: Place) -> _Own:
        state = place.marks.get("own")
        fits = {"rank": self._rank, "world_size": self._world_size, "workers": self._workers}
        if state is not None and all(state[key] == value for key, value in fits.items()):
            return _Own(**state)
        share, more = divmod(place.consumed // self._world_size, self._workers)
        if place.consumed:
            log.warning(
                "this rank's place in its part of the data was not saved for this number of ranks and workers: it "
                "skips as many samples as each of them has consumed, which is exact only if they are dealt in turn",
                samples=place.consumed // self._world_size,
            )
        counts = [share + (worker < more) for worker in range(self._workers)]
        return _Own(**fits, counts=counts, streams=[None] * self._workers, next=0)

    def _items(self, place: Place, own: _Own) -> Iterator[tuple[int, Item]]:
        """The batches of the workers in turn, a worker that has no more left out, and from whom each is."""
        starts = [
            Start((place.seed, place.epoch, place.turn, self._rank, worker), place.number, count, mark)
            for worker, (count, mark) in enumerate(zip(own.counts, own.streams, strict=True))
        ]
        first = [Ask(start, idle=worker < own.next) for worker, start in enumerate(starts)]
        self._tasks.make = lambda: itertools.chain(first, itertools.repeat(Ask()))
        ended: set[int] = set()
        for worker, item in zip(itertools.cycle(range(self._workers)), self._loader, strict=False):
            if item is None:
                ended.add(worker)
                if len(ended) == self._workers:
                    return
            elif item != IDLE:
                yield worker, item


class _Own(NamedTuple):
    """Where one rank's workers are in their parts. `next`: the worker whose turn it is."""

    rank: int
    world_size: int
    workers: int
    counts: list[int]
    streams: list[Mapping[str, Any] | None]
    next: int

    def after(self, worker: int, item: Item) -> _Own:
        counts, streams = list(self.counts), list(self.streams)
        counts[worker], streams[worker] = item.consumed, item.mark
        return self._replace(counts=counts, streams=streams, next=(worker + 1) % self.workers)

    def as_state(self) -> dict[str, Any]:
        return self._asdict()


def check_stream(dataset: Any) -> None:
    """Raises UsageError for what can be iterated only once."""
    if iter(dataset) is dataset:
        raise UsageError(
            f"run.loader needs the data anew for each epoch; a {type(dataset).__name__} can be read only once.",
            hint="Give an object whose __iter__ starts from the beginning, such as an IterableDataset.",
        )
