"""Samplers and ready-made DataLoaders: what they ask for is done, by all ranks together, also after an interruption."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from ray_tracking.errors import UsageError
from ray_tracking.runtime.loading.loader import ResumableLoader
from ray_tracking.runtime.loading.place import Place
from ray_tracking.runtime.loading.sampling import order_of
from tests.runtime.loading.common import Numbers, flat, in_stages, make, noise, plain, take, through_json

DATA = range(40)


class Evens(Sampler[int]):
    """A user's own: every second sample, shuffled by Python's global random numbers."""

    def __iter__(self) -> Iterator[int]:
        yield from random.sample(range(0, 40, 2), 20)

    def __len__(self) -> int:
        return 20


class Tensors(Evens):
    """With a generator of its own, and indices that are tensors."""

    def __init__(self) -> None:
        self.generator = torch.Generator()

    def __iter__(self) -> Iterator[Any]:
        yield from torch.randperm(40, generator=self.generator)[:20]


class ByEpoch(Sampler[int]):
    """Seeded by itself in set_epoch; does not know how many it gives."""

    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        yield from np.random.default_rng(self.epoch).permutation(40).tolist()


class Buckets(Sampler[list[int]]):
    """Batches of unequal length, in random order."""

    def __init__(self, sampler: Any = None) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[list[int]]:
        edges = [0, 3, 4, 9, 15, 16, 18, 25, 33, 40]
        batches = [list(range(*pair)) for pair in itertools.pairwise(edges)]
        yield from random.sample(batches, len(batches))

    def __len__(self) -> int:
        return 9


SAMPLERS: dict[str, Callable[[], Any]] = {
    "weighted": lambda: WeightedRandomSampler([1.0] * 10 + [0.1] * 30, 25),
    "weighted, own generator": lambda: WeightedRandomSampler([1.0] * 40, 25, generator=torch.Generator()),
    "subset": lambda: SubsetRandomSampler(list(range(5, 30))),
    "with replacement": lambda: RandomSampler(DATA, replacement=True, num_samples=30),
    "part": lambda: RandomSampler(DATA, num_samples=13),
    "a list": lambda: [5, 3, 9, 9, 1, 0],
    "own": Evens,
    "own generator": Tensors,
    "own epoch": ByEpoch,
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_is_drawn_alike_on_every_rank_and_after_an_interruption(name: str) -> None:
    def build(rank: int, world: int) -> ResumableLoader:
        return make(DATA, 3, rank=rank, world=world, sampler=SAMPLERS[name]())

    whole = take(build(0, 1))
    order = flat([whole])
    assert order != flat([take(make(DATA, 3, sampler=SAMPLERS[name](), seed=4))]) or name in ("a list", "own epoch")
    begun, rest = in_stages(build, [(1, 2), (1, None)])
    assert begun[0] + rest[0] == whole
    stages = in_stages(build, [(2, 1), (1, None)])
    assert sorted(sample for ranks in stages for sample in flat(ranks)) == sorted(order)


@pytest.mark.parametrize(
    "sampler",
    [[("a", 1), ("b", 2)], ["a", "b"], [np.int64(1), np.int64(2)], [torch.tensor(1), torch.tensor(2)]],
    ids=["pairs", "names", "numpy", "torch"],
)
def test_what_a_sampler_gives_is_what_the_dataset_is_asked_for(sampler: list[Any]) -> None:
    class Anything(dict[Any, Any]):
        def __missing__(self, key: Any) -> Any:
            return key

    expected = [[int(each) if isinstance(each, np.integer | torch.Tensor) else each for each in sampler]]
    assert take(make(Anything({1: 1, 2: 2}), 2, sampler=sampler, collate_fn=tuple)) == [[*map(plain, expected[0])]]
    assert take(make(Anything({1: 1, 2: 2}), batch_sampler=[sampler], collate_fn=tuple)) == [[*map(plain, expected[0])]]


@pytest.mark.parametrize("name", ["weighted", "own", "own epoch"])
def test_epochs_of_a_sampler_differ(name: str) -> None:
    loader = make(DATA, 3, sampler=SAMPLERS[name]())
    first = take(loader)
    loader.begin_epoch(1)
    assert take(loader) != first


def test_the_order_is_rank_0s() -> None:
    loader = make(DATA, 3, sampler=Evens(), share=lambda order: order[::-1])
    assert flat([take(loader)]) == flat([take(make(DATA, 3, sampler=Evens()))])[::-1]


def test_drawing_leaves_the_random_numbers_alone() -> None:
    """NumPy's kept half of a Gaussian pair too: an order is drawn once more after an interruption than without one."""
    order = order_of(40, None, Evens(), None, lambda order: order)
    numbers = []
    for draws in (0, 1):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        begun = noise()
        for _ in range(draws):
            order.draw(Place(3))
        numbers.append([begun, noise()])
    assert numbers[0] == numbers[1]


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(0, 4), st.integers(1, 4))
def test_batches_of_a_batch_sampler_stay_together(before: int, steps: int, after: int) -> None:
    def build(rank: int, world: int) -> ResumableLoader:
        return make(DATA, rank=rank, world=world, batch_sampler=Buckets())

    stages = in_stages(build, [(before, steps), (after, None)])
    seen = [sample for ranks in stages for sample in flat(ranks)]
    assert set(seen) == set(DATA)
    made = {tuple(batch) for batch in Buckets()}
    full = [batch for ranks in stages for batches in ranks for batch in batches[:-1]]
    assert {tuple(batch) for batch in full} <= made
    if 9 % before == 0 and after == 1:
        assert sorted(seen) == list(DATA)
    assert len({len(batches) for batches in stages[1]}) == 1


def test_a_sampler_that_gives_another_order_after_the_interruption_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    loader = make(DATA, 3, sampler=[3, 1, 2, 4])
    take(loader, 1)
    other = make(DATA, 3, sampler=[4, 1, 2, 3])
    other.load_state_dict(through_json(loader))
    assert take(other) == [[3]]
    assert "the sampler gives another order" in capsys.readouterr().err


class Unsteady(Evens):
    def __init__(self) -> None:
        self._random = random.Random(1)

    def __iter__(self) -> Iterator[int]:
        yield from self._random.sample(DATA, 40)


class Empty(ByEpoch):
    def __iter__(self) -> Iterator[int]:
        return iter([])


class Endless(ByEpoch):
    def __iter__(self) -> Iterator[int]:
        while True:
            yield 1


class HoldsEmpty(Buckets):
    def __iter__(self) -> Iterator[list[int]]:
        yield from [[1], []]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sampler": Unsteady(), "batch_size": 2}, "Unsteady gives another order each time"),
        ({"sampler": Endless(), "batch_size": 2}, "Endless gave more than 1000400 indices"),
        ({"sampler": iter([1, 2]), "batch_size": 2}, "can't be iterated once per epoch"),
        ({"sampler": ByEpoch(), "batch_size": 2, "shuffle": True}, "shuffle"),
        ({"sampler": Empty(), "batch_size": 2}, "gave no batch"),
        ({"sampler": [], "batch_size": 2}, "has 0 samples"),
        ({"batch_sampler": HoldsEmpty()}, "empty batch"),
        ({"batch_sampler": Buckets(DistributedSampler(DATA, 2, 0))}, "DistributedSampler gives one rank's samples"),
    ],
)
def test_a_sampler_that_cannot_be_resumed_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        take(make(DATA, **{"batch": options.pop("batch_size", 0), **options}))


# --- ready-made DataLoaders -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "same_as"),
    [
        ({"batch_size": 3, "shuffle": True}, {"shuffle": True}),
        ({"batch_size": 3}, {"shuffle": False}),
        ({"batch_size": 3, "shuffle": True, "drop_last": True}, {"shuffle": True, "drop_last": True}),
        ({"batch_size": 3, "sampler": SequentialSampler(range(7))}, {"shuffle": False, "data": range(7)}),
        ({"batch_size": 3, "sampler": DistributedSampler(DATA, 4, 1)}, {"shuffle": True}),
        ({"batch_size": 3, "sampler": DistributedSampler(DATA, 4, 1, shuffle=False)}, {"shuffle": False}),
        ({"batch_size": 3, "sampler": Evens()}, {"sampler": Evens()}),
        ({"batch_sampler": BatchSampler(RandomSampler(DATA), 3, True)}, {"shuffle": True, "drop_last": True}),
        ({"batch_sampler": Buckets()}, {"batch": 0, "batch_sampler": Buckets()}),
        ({"batch_size": None, "shuffle": True}, {"batch": None, "shuffle": True}),
        ({"batch_size": 3, "collate_fn": str, "timeout": 0}, {"shuffle": False, "collate_fn": str}),
    ],
)
def test_a_data_loader_is_taken_over(options: dict[str, Any], same_as: dict[str, Any]) -> None:
    for rank in range(2):
        taken = make(DataLoader(DATA, **options), rank=rank, world=2)
        expected = make(same_as.get("data", DATA), same_as.get("batch", 3), rank=rank, world=2, **_rest(same_as))
        assert take(taken) == take(expected)
        assert len(taken) == len(expected)


def _rest(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in ("data", "batch")}


def test_a_data_loader_of_an_iterable_dataset_is_taken_over() -> None:
    taken = make(DataLoader(Numbers(10), batch_size=4, drop_last=True, collate_fn=tuple), shuffle_buffer=5)
    assert take(taken) == take(make(Numbers(10), 4, drop_last=True, collate_fn=tuple, shuffle_buffer=5))
    assert taken.steps_per_epoch is None


def test_a_distributed_sampler_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    make(DataLoader(DATA, batch_size=3, sampler=DistributedSampler(DATA, 4, 0)))
    assert "in place of the DistributedSampler" in capsys.readouterr().err


class OwnWay(DataLoader[Any]):
    def __iter__(self) -> Any:
        return iter([1])


@pytest.mark.parametrize(
    ("loader", "options", "says"),
    [
        (DataLoader(DATA, batch_size=2), {"batch_size": 3}, "takes batch_size from the DataLoader"),
        (DataLoader(DATA), {"shuffle": False, "num_workers": 2}, "takes shuffle, num_workers from"),
        (DataLoader(DATA), {"batch_size": None}, "takes batch_size"),
        (OwnWay(DATA), {}, "OwnWay makes its batches in a way of its own"),
        (DataLoader(DATA, in_order=False), {}, "in_order"),
        (DataLoader(DATA), {"sharded": True}, "sharded can be given for an iterable"),
    ],
)
def test_a_data_loader_that_cannot_be_taken_over_is_refused(loader: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ResumableLoader(loader, seed=0, rank=0, world_size=1, **options)
