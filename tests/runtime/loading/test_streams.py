"""Iterable datasets: every sample once over all ranks, the same batches after an interruption as without one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_tracking.errors import UsageError
from ray_tracking.runtime.loading.loader import ResumableLoader
from tests.runtime.loading.common import Numbers, Stateful, flat, in_stages, make, take, through_json

WORLDS = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), max_size=3)
BUFFERS = st.sampled_from([0, 2, 7, 64])
KINDS = st.sampled_from([Numbers, Stateful])


@settings(deadline=None)
@given(st.integers(4, 150), st.integers(1, 20), WORLDS, st.integers(1, 4), BUFFERS, KINDS)
def test_every_sample_once_over_any_interruptions(
    samples: int, batch: int, stages: list[tuple[int, int]], last: int, buffer: int, kind: Callable[[int], Any]
) -> None:
    given_ = in_stages(
        lambda rank, world: make(kind(samples), batch, rank=rank, world=world, shuffle_buffer=buffer),
        [*stages, (last, None)],
    )
    for ranks in given_:
        assert len({len(batches) for batches in ranks}) == 1, "every rank takes part in every step"
    seen = [sample for ranks in given_ for sample in flat(ranks)]
    assert set(seen) == set(range(samples))
    # Only a rest smaller than the new world is given to several ranks: they must all take the step.
    assert len(seen) - samples < 4
    if all(world == last for world, _ in stages):
        assert len(seen) == samples


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_the_steps_are_those_of_a_map_style_dataset(samples: int, batch: int, world: int, drop_last: bool) -> None:
    if samples < (batch * world if drop_last else world):
        return
    options = {"world": world, "drop_last": drop_last}
    stream, mapped = make(Numbers(samples), batch, **options), make(range(samples), batch, **options)
    positions = [[(loader.consumed, loader.finished) for _ in loader] for loader in (stream, mapped)]
    assert positions[0] == positions[1]


@pytest.mark.parametrize("kind", [Numbers, Stateful])
@pytest.mark.parametrize("buffer", [0, 10])
def test_resumed_goes_on_with_the_next_batch(kind: Callable[[int], Any], buffer: int) -> None:
    whole = [take(make(kind(200), 4, rank=rank, world=2, shuffle_buffer=buffer)) for rank in range(2)]
    for steps in (1, 7, 16, 24, 25):
        stages = in_stages(
            lambda rank, world: make(kind(200), 4, rank=rank, world=world, shuffle_buffer=buffer),
            [(2, steps), (2, None)],
        )
        assert [begun + rest for begun, rest in zip(*stages, strict=True)] == whole


@pytest.mark.parametrize("buffer", [0, 50])
def test_a_dataset_with_a_state_is_not_read_again_from_the_beginning(buffer: int) -> None:
    first = make(Stateful(1000), 8, shuffle_buffer=buffer)
    take(first, 100)
    data = Stateful(1000)
    second = make(data, 8, shuffle_buffer=buffer)
    second.load_state_dict(through_json(first))
    assert flat([take(second)]) == flat([take(make(Numbers(1000), 8, shuffle_buffer=buffer))])[800:]
    assert data.read <= 264, "200 samples were left, and a window is 64"
    assert len(flat([take(second)])) == 1000, "the next pass begins at the beginning"


def test_reading_again_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    first = make(Numbers(30), 4)
    take(first, 3)
    second = make(Numbers(30), 4)
    second.load_state_dict(through_json(first))
    take(second)
    assert "the stream is read again up to the position" in capsys.readouterr().err


def test_passes_and_epochs_begin_anew() -> None:
    data = Stateful(10)
    loader = make(data, 4, shuffle_buffer=10)
    first, second = flat([take(loader)]), flat([take(loader)])
    assert first != second
    take(loader, 1)
    loader.begin_epoch(1)
    third = flat([take(loader)])
    assert sorted(first) == sorted(second) == sorted(third) == list(range(10))
    again = make(Numbers(10), 4, shuffle_buffer=10)
    again.begin_epoch(1)
    assert flat([take(again)]) == third


def test_a_loop_that_is_left_goes_on_where_it_was() -> None:
    loader = make(Numbers(10), 3)
    assert take(loader, 1) + take(loader, 2) + take(loader) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


def test_shuffled_in_windows() -> None:
    order = flat([take(make(Numbers(95), 5, shuffle_buffer=20))])
    windows = [order[begin : begin + 20] for begin in range(0, 95, 20)]
    assert [sorted(window) for window in windows] == [list(range(n, min(n + 20, 95))) for n in range(0, 95, 20)]
    assert all(window != sorted(window) for window in windows)


def test_length_where_it_is_known() -> None:
    class Sized(Numbers):
        def __len__(self) -> int:
            return self.samples

    assert len(make(Sized(10), 4)) == len(take(make(Sized(10), 4))) == 3
    assert len(make(Sized(10), 4, world=2)) == 2
    assert len(make(Sized(10), 4, world=2, sharded=True)) == 3
    with pytest.raises(TypeError):
        len(make(Numbers(10), 4))
    assert make(Numbers(10), 4).steps_per_epoch is None


def test_items_as_they_are() -> None:
    ranks = [take(make(Numbers(7), None, rank=rank, world=3)) for rank in range(3)]
    assert ranks == [[0, 3, 6], [1, 4, 6], [2, 5, 6]]


def test_an_object_that_is_only_iterable() -> None:
    class Words:
        def __iter__(self) -> Iterator[str]:
            return iter(["a", "b", "c"])

    assert take(make(Words(), 2)) == [["a", "b"], ["c"]]


def test_set_epoch_is_told() -> None:
    class ByEpoch(Numbers):
        def set_epoch(self, epoch: int) -> None:
            self.samples = 10 + epoch

    loader = make(ByEpoch(0), 4)
    assert [len(flat([take(loader)])) for _ in range(2)] == [10, 11]
    loader.begin_epoch(5)
    assert len(flat([take(loader)])) == 15


def test_a_dataset_that_shuffles_itself_is_the_same_stream_on_every_rank() -> None:
    class Shuffles(Numbers):
        def __iter__(self) -> Iterator[int]:
            order = random.sample(range(self.samples), self.samples)
            yield from (number for number in order if random.random() < 0.5)

    def build(rank: int, world: int) -> ResumableLoader:
        return make(Shuffles(200), 4, rank=rank, world=world)

    whole = flat([take(build(0, 1))])
    for stages in ([(2, None)], [(2, 3), (1, 2), (4, None)]):
        ranks = in_stages(build, stages)  # type: ignore[arg-type]
        assert sorted(sample for stage in ranks for sample in flat(stage)) == sorted(whole)


def test_an_endless_stream() -> None:
    class Endless:
        def __iter__(self) -> Iterator[int]:
            number = 0
            while True:
                yield number
                number += 1

    loader = make(Endless(), 4)
    assert take(loader, 3)[-1] == [8, 9, 10, 11]
    assert not loader.finished


@pytest.mark.parametrize(
    ("data", "options", "says"),
    [
        ((number for number in range(3)), {}, "generator can be read only once"),
        (Numbers(3), {"shuffle": True}, "shuffle_buffer"),
        (Numbers(3), {"sampler": [1]}, "sampler can be given for a map-style dataset only"),
        (Numbers(3), {"shuffle_buffer": -1}, "shuffle_buffer is -1"),
        (Numbers(0), {}, "gave no batch"),
        (Numbers(3), {"drop_last": True, "batch": 4}, "gave no batch"),
    ],
)
def test_what_cannot_be_read_is_refused(data: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        take(make(data, **{"batch": 2, **options}))


# --- data that is split already -------------------------------------------------------------------------------


class Split(Numbers):
    """Every rank its numbers, counted from 1000 times the rank."""

    def __init__(self, samples: int, rank: int) -> None:
        super().__init__(samples)
        self._rank = rank

    def __iter__(self) -> Iterator[int]:
        return (1000 * self._rank + number for number in super().__iter__())


class Agreeing:
    """What the ranks would agree on, where `least` of their asks are answered yes by all."""

    def __init__(self, least: int) -> None:
        self._yes = least

    def __call__(self, mine: bool) -> bool:
        self._yes -= 1
        return mine and self._yes >= 0


def test_a_rank_that_runs_out_ends_the_epoch_for_all(capsys: pytest.CaptureFixture[str]) -> None:
    """Rank 0 has 3 batches, rank 1 has 2."""
    long = make(Split(9, 0), 4, world=2, sharded=True, agree=Agreeing(2))
    short = make(Split(6, 1), 4, rank=1, world=2, sharded=True, agree=Agreeing(2))
    assert take(long) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert long.finished
    assert "is left out of the epoch" in capsys.readouterr().err
    assert take(short) == [[1000, 1001, 1002, 1003], [1004, 1005]]
    assert short.finished


def test_split_data_resumes_where_each_rank_was() -> None:
    whole = take(make(Split(30, 1), 4, rank=1, world=2, sharded=True, shuffle_buffer=6))
    first = make(Split(30, 1), 4, rank=1, world=2, sharded=True, shuffle_buffer=6)
    begun = take(first, 3)
    assert first.consumed == 24, "of both ranks"
    second = make(Split(30, 1), 4, rank=1, world=2, sharded=True, shuffle_buffer=6)
    second.load_state_dict(through_json(first))
    assert begun + take(second) == whole


def test_split_data_at_another_world_size_is_counted_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    first = make(Split(30, 0), 4, world=2, sharded=True)
    take(first, 3)
    second = make(Split(60, 0), 4, world=1, sharded=True)
    second.load_state_dict(through_json(first))
    assert take(second)[0] == [24, 25, 26, 27]
    assert "exact only if they are dealt in turn" in capsys.readouterr().err
