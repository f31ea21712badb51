"""The order of an epoch's samples, of map-style data: the same on every rank, drawn anew from (seed, epoch)."""

from __future__ import annotations

import itertools
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DistributedSampler, RandomSampler, SequentialSampler

from ray_tracking.errors import UsageError
from ray_tracking.runtime.loading.place import Place
from ray_tracking.runtime.loading.seeding import forked, seed_for

_ENDLESS = 1_000_000
"""Indices beyond ten times the expected after which a sampler counts as endless."""


class Order(Protocol):
    """`kind` names the order for checkpoints and messages; `draw` gives the units of a pass, sliceable."""

    kind: str
    batches: bool

    def __len__(self) -> int: ...
    def draw(self, place: Place) -> Any: ...


class InOrder:
    """The dataset's own order."""

    kind = "in order"
    batches = False

    def __init__(self, samples: int) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return self._samples

    def draw(self, place: Place) -> range:
        return range(self._samples)


class Shuffled:
    """A permutation. [samples], int32 where that is enough: 0.4 GB for 10**8 samples, drawn in 3 s."""

    kind = "shuffled"
    batches = False

    def __init__(self, samples: int) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return self._samples

    def draw(self, place: Place) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed_for(place.seed, place.epoch, place.turn))
        dtype = torch.int32 if self._samples < 2**31 else torch.int64
        return torch.randperm(self._samples, generator=generator, dtype=dtype)


class FromSampler:
    """What a sampler gives (indices, or lists of them with `batches`), run to its end at the start of a pass.

    Its random numbers come from the global generators or from its attribute `generator`, both seeded from (seed,
    epoch); `set_epoch` is called. `share` gives every rank rank 0's order, so that all deal the same one.
    """

    def __init__(self, sampler: Any, *, batches: bool, samples: int, share: Callable[[Any], Any]) -> None:
        self.kind = type(sampler).__name__
        self.batches = batches
        self._sampler = sampler
        self._samples = samples
        self._share = share
        self._known_to_repeat = False
        self._inner = [each for each in (sampler, getattr(sampler, "sampler", None)) if each is not None]
        self._check()

    def __len__(self) -> int:
        return len(self._sampler)

    def draw(self, place: Place) -> Sequence[Any]:
        order = self._drawn(place)
        if not self._known_to_repeat:
            if digest(order) != digest(self._drawn(place)):
                raise UsageError(
                    f"{self.kind} gives another order each time it is iterated, whatever the seed: an epoch could not "
                    "be resumed, and the ranks would not agree.",
                    hint="Let it draw from torch's, NumPy's or Python's global random numbers, from a torch.Generator "
                    "in its attribute `generator`, or seed itself in set_epoch(epoch).",
                )
            self._known_to_repeat = True
        shared: Sequence[Any] = self._share(order)
        return shared

    def _drawn(self, place: Place) -> Any:
        seed = seed_for(place.seed, place.epoch, place.turn)
        with forked(seed):
            for each in self._inner:
                if hasattr(each, "set_epoch"):
                    each.set_epoch(place.number)
                if isinstance(getattr(each, "generator", None), torch.Generator):
                    each.generator.manual_seed(seed)
            units = self._bounded(iter(self._sampler))
            if self.batches:
                return self._lists(units)
            first = next(units, None)
            if first is None:
                return []
            everything = itertools.chain([first], units)
            if isinstance(first, int | np.integer):
                return np.fromiter(everything, np.int64)
            if isinstance(first, torch.Tensor):
                return np.fromiter((each.item() for each in everything), np.int64)
            return list(everything)

    def _bounded(self, units: Iterator[Any]) -> Iterator[Any]:
        try:
            expected = len(self._sampler)
        except TypeError:
            expected = self._samples
        most = 10 * expected + _ENDLESS
        yield from itertools.islice(units, most)
        if next(units, None) is not None:
            raise UsageError(
                f"{self.kind} gave more than {most} {'batches' if self.batches else 'indices'}: an epoch must end.",
                hint="Let it stop after an epoch; or tell in its __len__ how many it gives.",
            )

    def _lists(self, units: Iterator[Any]) -> list[Any]:
        batches = [unit.tolist() if hasattr(unit, "tolist") else [_plain(index) for index in unit] for unit in units]
        if not all(batches):
            raise UsageError(f"{self.kind} gave an empty batch.", hint="Leave empty batches out.")
        return batches

    def _check(self) -> None:
        if not hasattr(self._sampler, "__iter__") or iter(self._sampler) is self._sampler:
            raise UsageError(
                f"{self.kind} can't be iterated once per epoch.",
                hint="Give an object whose __iter__ starts anew each time, such as a torch Sampler.",
            )
        for each in self._inner:
            if getattr(each, "num_replicas", 1) > 1:
                raise UsageError(
                    f"{type(each).__name__} gives one rank's samples only; run.loader deals the whole epoch itself.",
                    hint="Build it with num_replicas=1, rank=0, so that it gives all samples.",
                )


def order_of(
    samples: int, shuffle: bool | None, sampler: Any, batch_sampler: Any, share: Callable[[Any], Any]
) -> Order:
    """The order that these options of a DataLoader ask for. The samplers of torch that shuffle or don't are replaced.

    Their seed is the run's then, and a DistributedSampler's repeated or dropped samples are not.
    """
    if batch_sampler is not None:
        return FromSampler(batch_sampler, batches=True, samples=samples, share=share)
    if sampler is None:
        return Shuffled(samples) if shuffle or shuffle is None else InOrder(samples)
    if type(sampler) is SequentialSampler:
        return InOrder(len(sampler))
    if type(sampler) is RandomSampler and not sampler.replacement and len(sampler) == len(sampler.data_source):
        return Shuffled(len(sampler))
    if type(sampler) is DistributedSampler:
        count = len(sampler.dataset)  # type: ignore[arg-type]
        return Shuffled(count) if sampler.shuffle else InOrder(count)
    return FromSampler(sampler, batches=False, samples=samples, share=share)


def digest(order: Any) -> int:
    """A short name of an order, to see whether it is drawn again alike."""
    if isinstance(order, np.ndarray):
        return zlib.crc32(order.tobytes())
    found = 0
    for unit in order:
        try:
            found = zlib.crc32(array("q", unit), found)
        except TypeError:  # not a list of numbers
            found = zlib.crc32(repr(unit).encode(), found)
    return found


def as_list(units: Any) -> list[Any]:
    """A slice of an order as a list of plain indices (or whatever the sampler gave)."""
    return units.tolist() if hasattr(units, "tolist") else list(units)


def _plain(index: Any) -> Any:
    return index.item() if isinstance(index, torch.Tensor | np.integer) else index
