"""Loaders of ranks that are not there: what the tests of the loader share."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from ray_tracking.runtime.loading.loader import ResumableLoader


def make(data: Any, batch: int | None = 0, *, rank: int = 0, world: int = 1, **options: Any) -> ResumableLoader:
    return ResumableLoader(data, batch, seed=options.pop("seed", 3), rank=rank, world_size=world, **options)


def take(loader: Any, steps: int | None = None) -> list[Any]:
    """The batches, tensors as lists."""
    batches = []
    for batch in loader:
        batches.append(plain(batch))
        if steps is not None and len(batches) == steps:
            break
    return batches


def plain(batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    return [plain(each) for each in batch] if isinstance(batch, list | tuple) else batch


def flat(ranks: list[list[list[int]]]) -> list[int]:
    return [sample for batches in ranks for batch in batches for sample in batch]


def through_json(loader: ResumableLoader) -> Any:
    return json.loads(json.dumps(loader.state_dict()))


def in_stages(
    build: Callable[[int, int], ResumableLoader], stages: list[tuple[int, int | None]]
) -> list[list[list[list[int]]]]:
    """An epoch in several processes' lives: in each (world size, steps), all ranks take the steps and are then killed.

    For each stage the batches of each rank. All but the last stage end at the latest with the epoch.
    """
    state, given = None, []
    for world, steps in stages:
        loaders = [build(rank, world) for rank in range(world)]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(state)
            loader.begin_epoch(0)
        given.append([[] if steps == 0 else take(loader, steps) for loader in loaders])
        state = through_json(loaders[0])
    return given


class Numbers(IterableDataset):  # type: ignore[type-arg]
    """0, 1, ..., and how many samples were read."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.read = 0

    def __iter__(self) -> Iterator[Any]:
        for number in range(self.samples):
            self.read += 1
            yield number


class Stateful(Numbers):
    """The same, with a state; it forgets to begin anew, as such datasets do."""

    position = 0

    def __iter__(self) -> Iterator[Any]:
        while self.position < self.samples:
            self.position += 1
            self.read += 1
            yield self.position - 1

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def noise() -> list[float]:
    """A number of each global generator; an odd number of NumPy's Gaussian ones, of which it keeps a half."""
    return [random.random(), random.gauss(0, 1), float(np.random.randn()), float(torch.randn(()))]


class Noisy:
    """Map-style, with random augmentation."""

    def __init__(self, samples: int) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> list[float]:
        return [index, *noise()]


class NoisyStream(Numbers):
    def __iter__(self) -> Iterator[Any]:
        for number in super().__iter__():
            yield [number, *noise()]


def as_list(samples: list[Any]) -> list[Any]:
    """A collate function that draws a random number too."""
    return [*samples, noise()]
