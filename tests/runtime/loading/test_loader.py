"""The order of samples: every sample of an epoch once, whatever the ranks, the interruption, the new world size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from ray_tracking.errors import UsageError
from ray_tracking.runtime.loading.dealing import GlobalBatches, batch_part, rank_part
from ray_tracking.runtime.loading.loader import ResumableLoader
from tests.runtime.loading.common import flat, in_stages, make, take, through_json

WORLDS = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4)), max_size=4)


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 5))
def test_every_sample_once_over_all_ranks(samples: int, batch: int, world: int) -> None:
    if samples < world:
        return
    ranks = [take(make(range(samples), batch, rank=rank, world=world)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1, "every rank takes part in every step"
    assert {len(batches) for batches in ranks} == {len(make(range(samples), batch, world=world))}
    assert all(batch_ for batches in ranks for batch_ in batches)
    assert sorted(flat(ranks)) == list(range(samples))


@settings(deadline=None)
@given(st.integers(5, 80), st.integers(1, 4), WORLDS, st.integers(1, 5))
def test_every_sample_once_over_any_interruptions(
    samples: int, batch: int, stages: list[tuple[int, int]], last: int
) -> None:
    given_ = in_stages(lambda rank, world: make(range(samples), batch, rank=rank, world=world), [*stages, (last, None)])
    for ranks in given_:
        assert len({len(batches) for batches in ranks}) == 1
    seen = [sample for ranks in given_ for sample in flat(ranks)]
    # Only a rest smaller than the new world is given to several ranks: they must all take the step.
    assert set(seen) == set(range(samples))
    assert len(seen) - samples < 5
    if all(world == last for world, _ in stages):
        assert len(seen) == samples


def test_resumed_inside_an_epoch_goes_on_with_the_next_batch() -> None:
    whole = take(make(range(50), 4))
    first = make(range(50), 4)
    begun = take(first, 5)
    second = make(range(50), 4, seed=99)
    second.load_state_dict(through_json(first))
    second.begin_epoch(0)
    assert (second.epoch, second.consumed, second.finished) == (0, 20, False)
    assert begun + take(second) == whole


def test_epochs_differ_and_repeat_by_seed() -> None:
    loader = make(range(30), 4)
    first = take(loader)
    loader.begin_epoch(1)
    second = take(loader)
    assert first != second
    again = make(range(30), 4)
    again.begin_epoch(1)
    assert take(again) == second
    assert take(make(range(30), 4, seed=4)) != first


def test_finished_and_length() -> None:
    loader = make(range(10), 4)
    assert len(loader) == loader.steps_per_epoch == 3
    seen = []
    for _ in loader:
        seen.append(loader.finished)
    assert seen == [False, False, True]
    assert len(make(range(10), 4, drop_last=True)) == 2
    assert flat([take(make(range(10), 4, drop_last=True, shuffle=False))]) == list(range(8))


def test_a_pass_that_is_through_is_followed_by_another() -> None:
    """As in loops without epochs, or a validation set that is used several times in one."""
    loader = make(range(10), 4)
    first, second = take(loader), take(loader)
    assert first != second
    assert sorted(flat([first])) == sorted(flat([second])) == list(range(10))
    third = take(loader, 2)
    resumed = make(range(10), 4)
    resumed.load_state_dict(through_json(loader))
    rest = take(resumed)
    again = make(range(10), 4)
    assert [take(again), take(again), take(again)] == [first, second, third + rest]
    assert [take(again)] == [take(resumed)], "and so does the fourth"


def test_a_loop_left_at_its_last_batch_is_through() -> None:
    loader = make(range(10), 4)
    loader.begin_epoch(0)
    assert len(take(loader, 3)) == 3
    assert len(take(loader)) == 3


def test_a_loop_that_is_left_goes_on_where_it_was() -> None:
    loader = make(range(10), 3)
    assert take(loader, 1) + take(loader, 2) + take(loader) == take(make(range(10), 3))


def test_restored_at_the_end_of_an_epoch_gives_nothing_once() -> None:
    """What follows the inner loop runs again; no batch does."""
    loader = make(range(10), 4)
    loader.begin_epoch(2)
    take(loader)
    state = through_json(loader)
    restored = make(range(10), 4)
    restored.load_state_dict(state)
    restored.begin_epoch(2)
    assert restored.finished
    assert take(restored) == []
    assert len(take(restored)) == 3
    outside = make(range(10), 4)
    outside.load_state_dict(state)
    assert len(take(outside)) == 3, "a loop that knows no epochs begins the next pass"


def test_loaders_do_not_disturb_each_other() -> None:
    train, validation = make(range(20), 4), make(range(100, 110), 5, shuffle=False)
    seen = []
    for batch in train:
        seen.append(batch.tolist())
        assert flat([take(validation)]) == list(range(100, 110))
    assert seen == take(make(range(20), 4))


def test_a_loader_inside_its_own_loop_is_refused() -> None:
    loader = make(range(20), 4)
    outer = iter(loader)
    next(outer)
    take(loader, 1)
    with pytest.raises(UsageError, match="inside its own loop"):
        next(outer)


def test_an_iteration_ends_with_its_epoch() -> None:
    loader = make(range(20), 4)
    old = iter(loader)
    next(old)
    loader.begin_epoch(1)
    assert next(old, None) is None
    assert loader.consumed == 0
    assert len(take(loader)) == 5


def test_without_shuffling_the_order_is_the_dataset() -> None:
    assert flat([take(make(range(10), 3, shuffle=False))]) == list(range(10))


def test_items_as_they_are() -> None:
    """batch_size=None: a step is an item; the last items are given twice, since each rank needs one."""
    ranks = [take(make(range(7), None, rank=rank, world=3, shuffle=False)) for rank in range(3)]
    assert ranks == [[0, 3, 6], [1, 4, 6], [2, 5, 6]]
    assert take(make(range(7), None, world=3, shuffle=False, drop_last=True)) == [0, 3]


def test_a_dataset_that_fetches_whole_batches() -> None:
    class Whole(list[int]):
        def __getitems__(self, indices: list[int]) -> list[int]:
            return [-self[index] for index in indices]

    assert take(make(Whole(range(4)), 2, shuffle=False)) == [[0, -1], [-2, -3]]


def test_a_sample_given_twice_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    loader = make(range(5), 2, world=3)
    loader.load_state_dict({**loader.state_dict(), "consumed": 4})
    assert len(take(loader)) == 1
    assert capsys.readouterr().err.count("fewer samples than ranks") == 1


@pytest.mark.parametrize(
    ("before", "says"),
    [
        (make(range(12), 4), "another number of samples in the dataset"),
        (make(range(10), 2), "another batch size"),
        (make(range(10), 4, shuffle=False), "another order of samples"),
        (make(range(10), batch_sampler=[[0], [1], [2]]), "the epoch begins anew"),
        (make(range(10), 4), ""),
    ],
)
def test_what_changed_since_the_checkpoint_is_said(
    before: ResumableLoader, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    take(before, 1)
    loader = make(range(10), 4)
    loader.load_state_dict(through_json(before))
    said = capsys.readouterr().err
    assert says in said
    assert bool(says) == bool(said)
    assert loader.consumed == (0 if "anew" in says else before.consumed)


def test_a_dataset_smaller_than_the_position_has_nothing_left() -> None:
    before = make(range(20), 4)
    take(before, 4)
    loader = make(range(10), 4)
    loader.load_state_dict(before.state_dict())
    loader.begin_epoch(0)
    assert take(loader) == []
    assert loader.finished
    loader.begin_epoch(1)
    assert len(take(loader)) == 3


@pytest.mark.parametrize(
    ("consumed", "expected"),
    [(0, [(0, 4), (4, 9)]), (4, [(4, 9)]), (8, [(8, 9)]), (9, [])],
)
def test_a_rest_smaller_than_the_world_joins_the_batch_before(consumed: int, expected: list[tuple[int, int]]) -> None:
    assert list(GlobalBatches(9, consumed, size=4, world_size=2)) == expected


def test_global_batches_of_a_large_dataset_are_not_listed() -> None:
    batches = GlobalBatches(10**15 + 5, 10**9, size=1000, world_size=10)
    assert len(batches) == 10**12 - 10**6
    assert batches[len(batches) - 1 : len(batches)] == [(10**15 - 1000, 10**15 + 5)]
    with pytest.raises(IndexError):
        batches[len(batches)]


def test_parts_of_a_rank() -> None:
    assert [list(rank_part(0, 5, rank=rank, world_size=3)) for rank in range(3)] == [[0, 1], [2, 3], [4]]
    assert [list(rank_part(4, 5, rank=rank, world_size=3)) for rank in range(3)] == [[4], [4], [4]]


def test_batches_of_a_step_are_split_where_they_are_fewer_than_ranks() -> None:
    whole = [[1, 2, 3], [4], [5, 6]]
    assert [batch_part(whole, rank=rank, world_size=3) for rank in range(3)] == whole
    assert [batch_part(whole[:2], rank=rank, world_size=4) for rank in range(4)] == [[1, 2], [3], [4], [4]]


@pytest.mark.parametrize(
    ("dataset", "options", "says"),
    [
        (TensorDataset(torch.arange(4)), {"batch_size": 0}, "batch_size is 0"),
        (TensorDataset(torch.arange(1)), {"world_size": 2}, "has 1 samples"),
        (TensorDataset(torch.arange(4)), {"world_size": 2, "batch_size": 3, "drop_last": True}, "need at least 6"),
        (TensorDataset(torch.arange(4)), {"generator": torch.Generator()}, "generator can't be given"),
        (TensorDataset(torch.arange(4)), {"in_order": False}, "in_order"),
        (TensorDataset(torch.arange(4)), {"prefetch_factor": 2}, "does not take these options: prefetch_factor"),
        (TensorDataset(torch.arange(4)), {"colour": "red"}, "colour"),
        (TensorDataset(torch.arange(4)), {"sharded": True, "shuffle_buffer": 5}, "sharded, shuffle_buffer"),
        (TensorDataset(torch.arange(4)), {"sampler": [1], "shuffle": True}, "sampler makes the order"),
        (TensorDataset(torch.arange(4)), {"batch_sampler": [[1]]}, "batch_sampler can't be given together"),
        (42, {}, "neither __len__"),
    ],
)
def test_what_cannot_be_sharded_is_refused(dataset: Any, options: dict[str, Any], says: str) -> None:
    arguments = {"batch_size": 2, "seed": 0, "rank": 0, "world_size": 1, **options}
    with pytest.raises(UsageError, match=says):
        ResumableLoader(dataset, **arguments)
