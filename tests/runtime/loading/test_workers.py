"""Worker processes and random augmentation: what a batch holds depends on where it stands, not on who made it."""

from __future__ import annotations

import gc
import multiprocessing
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.utils.data import DataLoader, get_worker_info

from ray_tracking.runtime.loading.loader import ResumableLoader
from tests.runtime.loading.common import Noisy, NoisyStream, Numbers, as_list, make, take, through_json

FORKED = {"num_workers": 2, "prefetch_factor": 3, "multiprocessing_context": "fork"}


def data(kind: str) -> Any:
    return Noisy(50) if kind == "mapped" else NoisyStream(50)


def options(kind: str) -> dict[str, Any]:
    return {"collate_fn": as_list, **({} if kind != "shuffled stream" else {"shuffle_buffer": 12})}


@pytest.mark.parametrize("kind", ["mapped", "stream", "shuffled stream"])
@pytest.mark.parametrize("workers", [{}, FORKED], ids=["here", "workers"])
def test_random_augmentation_is_the_same_after_an_interruption(kind: str, workers: dict[str, Any]) -> None:
    whole = take(make(data(kind), 4, world=2, **options(kind)))
    first = make(data(kind), 4, world=2, **options(kind), **workers)
    begun = take(first, 3)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    second = make(data(kind), 4, world=2, **options(kind), **workers)
    second.load_state_dict(through_json(first))
    rest = take(second)
    assert begun + rest == whole
    samples = [tuple(sample) for batch in whole for sample in batch]
    assert len(set(samples)) == len(samples), "and every sample has random numbers of its own"


@pytest.mark.parametrize("kind", ["mapped", "stream", "shuffled stream"])
def test_the_training_loops_random_numbers_are_left_alone(kind: str) -> None:
    drawn = []
    for steps in (0, 5):
        random.seed(7), np.random.seed(7), torch.manual_seed(7)
        loader = make(data(kind), 4, **options(kind))
        if steps:
            take(loader, steps)
        drawn.append([random.random(), random.gauss(0, 1), float(np.random.rand()), float(torch.randn(()))])
    assert drawn[0] == drawn[1]


def test_a_failing_dataset_leaves_the_random_numbers_alone() -> None:
    class Fails(Noisy):
        def __getitem__(self, index: int) -> Any:
            raise OSError(index)

    random.seed(7)
    before = random.getstate()
    bits = np.random.mtrand.get_bit_generator()  # type: ignore[attr-defined]
    with pytest.raises(OSError, match=r"\d+"):
        take(make(Fails(50), 4))
    assert random.getstate() == before
    assert np.random.mtrand.get_bit_generator() is bits  # type: ignore[attr-defined]


class Told(Noisy):
    """Says what its worker process was told."""

    offset = 0

    def __getitem__(self, index: int) -> Any:
        info = get_worker_info()
        return index, self.offset, info is not None and info.dataset is self


def set_offset(worker: int) -> None:
    get_worker_info().dataset.offset = 100 + worker  # type: ignore[union-attr]


def test_persistent_workers_over_epochs_and_loops_that_are_left() -> None:
    ready = DataLoader(
        Told(12), batch_size=3, collate_fn=list, worker_init_fn=set_offset, persistent_workers=True, **FORKED
    )
    loader = make(ready)
    assert take(loader, 1) == [[[0, 100, True], [1, 100, True], [2, 100, True]]], "the next ones were read ahead"
    assert loader.consumed == 3
    assert [batch[0][0] for batch in take(loader)] == [3, 6, 9]
    loader.begin_epoch(1)
    assert [batch[0][0] for batch in take(loader)] == [0, 3, 6, 9]


def test_persistent_worker_of_a_stream(capsys: pytest.CaptureFixture[str]) -> None:
    loader = make(Numbers(10), 3, persistent_workers=True, **FORKED)
    assert "one worker reads the stream" in capsys.readouterr().err
    assert take(loader, 2) == [[0, 1, 2], [3, 4, 5]]
    assert take(loader) == [[6, 7, 8], [9]]
    loader.begin_epoch(1)
    assert take(loader) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


@pytest.mark.parametrize("kind", ["mapped", "stream"])
def test_the_workers_of_a_loader_end_with_it(kind: str) -> None:
    """At once: torch takes seconds to end those of a loader that is left to the collector of cycles."""
    before = set(multiprocessing.active_children())
    loader = make(data(kind), 4, persistent_workers=True, **options(kind), **FORKED)
    take(loader, 2)
    assert set(multiprocessing.active_children()) - before
    gc.disable()
    try:
        del loader
        assert set(multiprocessing.active_children()) <= before
    finally:
        gc.enable()


class SplitByWorker(Numbers):
    """As torch asks of an iterable dataset; the first worker has twice as many."""

    def __iter__(self) -> Iterator[int]:
        worker = get_worker_info().id  # type: ignore[union-attr]
        for number in range(self.samples // (worker + 1)):
            yield 1000 * worker + number


def test_split_data_in_several_workers_resumes_in_the_turn_it_was() -> None:
    def build() -> ResumableLoader:
        return make(SplitByWorker(12), 2, sharded=True, **FORKED)

    whole = take(build())
    assert [batch[0] for batch in whole] == [0, 1000, 2, 1002, 4, 1004, 6, 8, 10]
    for steps in (3, 7):
        first = build()
        begun = take(first, steps)
        second = build()
        second.load_state_dict(through_json(first))
        assert begun + take(second) == whole


def _rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    split = make(Numbers(9 if rank == 0 else 6), 4, rank=rank, world=2, sharded=True)
    own_order = make(range(6), 2, rank=rank, world=2, sampler=[rank, 2, 3, 4, 5, 1 - rank])
    torch.save([take(split), split.finished, take(own_order)], folder / str(rank))
    dist.destroy_process_group()


def test_two_processes_agree(tmp_path: Path) -> None:
    """On the end of data that is split already, and on the order of a sampler: rank 0's."""
    torch.multiprocessing.start_processes(_rank, args=(tmp_path,), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert first[:2] == [[[0, 1, 2, 3], [4, 5, 6, 7]], True]
    assert second[:2] == [[[0, 1, 2, 3], [4, 5]], True]
    assert [first[2], second[2]] == [[[0, 2], [5]], [[3, 4], [1]]]
