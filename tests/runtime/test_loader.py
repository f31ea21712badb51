"""The order of samples: every sample of an epoch once, whatever the ranks, the interruption, the new world size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ray_tracking.errors import UsageError
from ray_tracking.runtime.loader import ResumableLoader, epoch_order, global_batches, rank_part


def make(samples: int, batch: int, *, rank: int = 0, world: int = 1, **options: Any) -> ResumableLoader:
    return ResumableLoader(
        TensorDataset(torch.arange(samples)),
        batch,
        shuffle=options.pop("shuffle", True),
        seed=options.pop("seed", 3),
        rank=rank,
        world_size=world,
        **options,
    )


def take(loader: ResumableLoader, steps: int | None = None) -> list[list[int]]:
    batches = []
    for (x,) in loader:
        batches.append(x.tolist())
        if steps is not None and len(batches) == steps:
            break
    return batches


@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 5))
def test_every_sample_once_over_all_ranks(samples: int, batch: int, world: int) -> None:
    if samples < world:
        return
    ranks = [take(make(samples, batch, rank=r, world=world)) for r in range(world)]
    assert len({len(batches) for batches in ranks}) == 1, "every rank takes part in every step"
    assert all(batch_ for batches in ranks for batch_ in batches)
    seen = sorted(x for batches in ranks for one in batches for x in one)
    assert seen == list(range(samples))


@given(st.integers(4, 60), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.data())
def test_resumed_at_another_world_size(samples: int, batch: int, before: int, after: int, data: Any) -> None:
    loaders = [make(samples, batch, rank=r, world=before) for r in range(before)]
    steps = data.draw(st.integers(1, len(loaders[0])))
    seen = [x for loader in loaders for one in take(loader, steps) for x in one]
    state = loaders[0].state_dict()
    rest = []
    for rank in range(after):
        loader = make(samples, batch, rank=rank, world=after)
        loader.load_state_dict(state)
        loader.begin_epoch(0)
        rest.append(take(loader))
    assert len({len(batches) for batches in rest}) == 1
    left = [x for batches in rest for one in batches for x in one]
    # Only a rest smaller than the new world is given to several ranks: they must all take the step.
    if samples - len(seen) >= after or samples == len(seen):
        assert sorted(seen + left) == list(range(samples))
    else:
        assert set(seen) | set(left) == set(range(samples))


def test_resumed_inside_an_epoch_goes_on_with_the_next_batch() -> None:
    whole = take(make(50, 4))
    first = make(50, 4)
    begun = take(first, 5)
    second = make(50, 4, seed=99)
    second.load_state_dict(first.state_dict())
    second.begin_epoch(0)
    assert begun + take(second) == whole


def test_epochs_differ_and_repeat_by_seed() -> None:
    loader = make(30, 4)
    first = take(loader)
    loader.begin_epoch(1)
    second = take(loader)
    assert first != second
    again = make(30, 4)
    again.begin_epoch(1)
    assert take(again) == second
    assert take(make(30, 4, seed=4)) != first


def test_the_torch_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    take(make(30, 4))
    assert torch.equal(torch.rand(3), expected)


def test_workers_give_the_same_order() -> None:
    assert take(make(23, 4, num_workers=2)) == take(make(23, 4))


def test_finished_and_length() -> None:
    loader = make(10, 4)
    assert len(loader) == 3
    assert not loader.finished
    take(loader)
    assert loader.finished
    assert take(loader) == []
    assert len(make(10, 4, drop_last=True)) == 2


def test_without_shuffling_the_order_is_the_dataset() -> None:
    assert [x for one in take(make(10, 3, shuffle=False)) for x in one] == list(range(10))
    assert torch.equal(epoch_order(5, seed=0, epoch=0, shuffle=False), torch.arange(5))


@pytest.mark.parametrize(
    ("consumed", "expected"),
    [(0, [(0, 4), (4, 9)]), (4, [(4, 9)]), (8, [(8, 9)]), (9, [])],
)
def test_a_rest_smaller_than_the_world_joins_the_batch_before(consumed: int, expected: list[tuple[int, int]]) -> None:
    assert global_batches(9, consumed, batch_size=2, world_size=2, drop_last=False) == expected


def test_parts_of_a_rank() -> None:
    assert [list(rank_part(0, 5, rank=r, world_size=3)) for r in range(3)] == [[0, 1], [2, 3], [4]]
    assert [list(rank_part(4, 5, rank=r, world_size=3)) for r in range(3)] == [[4], [4], [4]]


class Endless(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(range(3))


@pytest.mark.parametrize(
    ("dataset", "options", "says"),
    [
        (DataLoader(TensorDataset(torch.arange(4))), {}, "not a DataLoader"),
        (Endless(), {}, "no length"),
        (TensorDataset(torch.arange(4)), {"batch_size": 0}, "batch_size is 0"),
        (TensorDataset(torch.arange(1)), {"world_size": 2}, "has 1 samples"),
        (TensorDataset(torch.arange(4)), {"sampler": []}, "sampler"),
    ],
)
def test_what_cannot_be_sharded_is_refused(dataset: Any, options: dict[str, Any], says: str) -> None:
    arguments = {"batch_size": 2, "shuffle": True, "seed": 0, "rank": 0, "world_size": 1, **options}
    with pytest.raises(UsageError, match=says):
        ResumableLoader(dataset, **arguments)
