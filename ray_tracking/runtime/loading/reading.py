"""Reading a stream of samples from a position on: what a DataLoader's worker process does for an iterable dataset.

The stream is cut into windows. A window begins with random numbers of its own and, where the dataset can tell it, the
dataset's state: to go on from a position, only the samples of its window before it are read again. Shuffling is
within a window too: while one is handed out in random order the next is read, a sample for a sample.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, default_collate, default_convert

from ray_tracking.runtime.loading.seeding import OwnRandom, seed_for, seed_generators

_WINDOW = 64
"""Samples between two states of a dataset that is not shuffled."""
_KEPT_STATES = 3
"""The window that is handed out, the one being read, and the one before."""
IDLE = "idle"
"""Given for a task that only opens a stream: its worker has had its turn before the interruption."""


class Start(NamedTuple):
    """Where to begin: what the random numbers depend on, the epoch for `set_epoch`, samples before the position."""

    seeds: tuple[int, ...]
    number: int
    consumed: int
    mark: Mapping[str, Any] | None


class Ask(NamedTuple):
    """A task for a reader: the next batch; with `start`, of a pass that begins there."""

    start: Start | None = None
    idle: bool = False


class Item(NamedTuple):
    """This rank's batch, and the position behind the global batch it is of."""

    consumed: int
    last: bool
    repeated: bool
    mark: Mapping[str, Any] | None
    batch: Any


class Part(NamedTuple):
    """What was read for one step: how many samples all ranks get, this rank's, and one it could repeat."""

    samples: int
    mine: list[Any]
    spare: Any
    consumed: int
    mark: Mapping[str, Any] | None


class Samples:
    """The samples of one pass, in order, from a window on. Iterate it inside `random`, which is its own."""

    def __init__(
        self, dataset: Any, start: Start, first: int, *, window: int, shuffle: bool, random: OwnRandom
    ) -> None:
        self._dataset = dataset
        self._seeds = start.seeds
        self._first = first
        self._window = window
        self._shuffle = shuffle
        self._random = random
        self._states: dict[int, Any] = {}

    def __iter__(self) -> Iterator[Any]:
        samples = self._read()
        if not self._shuffle:
            yield from samples
            return
        current = list(itertools.islice(samples, self._window))
        for number in itertools.count(self._first):
            seed = seed_for(*self._seeds, "order", number)
            coming: list[Any] = []
            for index in torch.randperm(len(current), generator=torch.Generator().manual_seed(seed)).tolist():
                sample, current[index] = current[index], None
                yield sample
                coming.extend(itertools.islice(samples, 1))
            if not coming:
                return
            current = coming

    def _read(self) -> Iterator[Any]:
        seed_generators(seed_for(*self._seeds, "begin"))
        stream = iter(self._dataset)
        for number in itertools.count(self._first):
            seed_generators(seed_for(*self._seeds, "window", number))
            if is_stateful(self._dataset):
                self._states[number] = copy.deepcopy(self._dataset.state_dict())
                self._states.pop(number - _KEPT_STATES, None)
            for _ in range(self._window):
                self._random.drop_half()
                try:
                    sample = next(stream)
                except StopIteration:
                    return
                yield sample

    def mark(self, position: int) -> Mapping[str, Any] | None:
        """What `Reader` needs to come back to a position just reached."""
        known = [number for number in self._states if number <= position // self._window]
        if not known:
            return None
        return {"at": max(known) * self._window, "window": self._window, "state": self._states[max(known)]}


class Reader(Dataset[Any]):
    """The dataset a DataLoader sees: `reader[Ask(...)]` is an Item, None at the end, or IDLE."""

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
    ) -> None:
        self.dataset = dataset
        self._single = batch_size is None
        self._size = world_size * (batch_size or 1)
        self._rank = rank
        self._world_size = world_size
        self._drop_last = drop_last
        self._collate = collate or (default_convert if self._single else default_collate)
        self._window = shuffle_buffer or _WINDOW
        self._shuffle = shuffle_buffer > 0
        self._reading = OwnRandom(goes_on=True)
        self._collating = OwnRandom(goes_on=False)
        self._beginning: Any = None
        self._used = False
        self._items: Iterator[Item] = iter(())

    def __getitem__(self, ask: Ask) -> Item | str | None:
        if ask.start is not None:
            self._items = self._batches(ask.start)
        return IDLE if ask.idle else next(self._items, None)

    def _batches(self, start: Start) -> Iterator[Item]:
        for part, last in self._one_ahead(self._parts(start)):
            mine = part.mine or [part.spare]
            with self._collating:
                seed_generators(seed_for(*start.seeds, "batch", part.consumed, self._rank))
                batch = self._collate(mine[0] if self._single else mine)
            yield Item(part.consumed, last, not part.mine, part.mark, batch)

    def _one_ahead(self, parts: Iterator[Part]) -> Iterator[tuple[Part, bool]]:
        """Each step's part and whether it is the last; a rest as `GlobalBatches` has it."""
        held: Part | None = None
        for part in parts:
            if part.samples < self._size and self._drop_last:
                break
            if held is not None and part.samples < self._world_size and not self._single:
                held = part._replace(samples=held.samples + part.samples, mine=held.mine + part.mine)
                continue
            if held is not None:
                yield held, False
            held = part
        if held is not None:
            yield held, True

    def _parts(self, start: Start) -> Iterator[Part]:
        with self._reading:
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(start.number)
            first = self._to_window(start.mark)
            samples = Samples(
                self.dataset, start, first, window=self._window, shuffle=self._shuffle, random=self._reading
            )
            stream = iter(samples)
            skipped = sum(1 for _ in itertools.islice(stream, start.consumed - first * self._window))
        position = first * self._window + skipped
        while True:
            with self._reading:
                mine, count, sample = [], 0, None
                for count, sample in enumerate(itertools.islice(stream, self._size), start=1):
                    if (count - 1) % self._world_size == self._rank:
                        mine.append(sample)
                position += count
                mark = samples.mark(position)
            if not count:
                return
            yield Part(count, mine, sample, position, mark)

    def _to_window(self, mark: Mapping[str, Any] | None) -> int:
        """Put the dataset's state to the mark's window, else to the beginning; the number of the window."""
        if not is_stateful(self.dataset):
            return 0
        first = 0
        if not self._used:
            self._beginning = copy.deepcopy(self.dataset.state_dict())
        if mark is not None and mark["window"] == self._window:
            self.dataset.load_state_dict(copy.deepcopy(mark["state"]))
            first = mark["at"] // self._window
        elif self._used:
            self.dataset.load_state_dict(copy.deepcopy(self._beginning))
        self._used = True
        return first


def is_stateful(dataset: Any) -> bool:
    return hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")
