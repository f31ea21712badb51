"""torch's DataLoader as it is used here: told task by task what to fetch, so that we decide what a batch is.

In: options of a DataLoader, or a ready-made one. Out: a DataLoader that runs our tasks in its worker processes, and
what was asked of the ready-made one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, get_worker_info

from ray_tracking.errors import UsageError


class Tasks:
    """What a DataLoader takes for its sampler: whatever `make` gives when an iteration begins."""

    def __init__(self) -> None:
        self.make: Callable[[], Iterator[Any]] = lambda: iter(())

    def __iter__(self) -> Iterator[Any]:
        return self.make()


class _WorkerInit:
    """Runs in a worker process before the first task: the worker's info shows the user's dataset, not our wrapper."""

    def __init__(self, given: Callable[[int], Any] | None) -> None:
        self._given = given

    def __call__(self, worker: int) -> None:
        info = get_worker_info()
        if info is not None:
            wrapper: Any = info.dataset
            object.__setattr__(info, "dataset", wrapper.dataset)  # WorkerInfo refuses its own setattr
        if self._given is not None:
            self._given(worker)


def as_it_is(batch: Any) -> Any:
    """Collates nothing: the wrapped dataset has done it, under the batch's own random numbers."""
    return batch


def build(fetch: Any, tasks: Tasks, options: dict[str, Any]) -> DataLoader[Any]:
    """A DataLoader that gives `fetch[task]` for each task. With several workers, task i runs in worker i modulo them.

    Its `generator` is its own: DataLoader draws from it at each start, and a resumed epoch starts once more than one
    that was never interrupted, which must not show in the training loop's random numbers.
    """
    if options.get("in_order") is False:
        raise UsageError(
            "run.loader can't take in_order=False: with batches in the order of their arrival no position is exact.",
            hint="Leave in_order out.",
        )
    if "generator" in options:
        raise UsageError("run.loader draws the order of samples from the run's seed; generator can't be given.")
    try:
        return DataLoader(
            fetch,
            batch_size=None,
            sampler=tasks,
            collate_fn=as_it_is,
            generator=torch.Generator(),
            **{**options, "worker_init_fn": _WorkerInit(options.get("worker_init_fn"))},
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"torch's DataLoader does not take these options: {error}") from error


def start_seed(loader: DataLoader[Any], seed: int) -> None:
    """What the worker processes of the next iteration start from: their `worker_init_fn` may draw."""
    assert loader.generator is not None
    loader.generator.manual_seed(seed)


def arguments_of(loader: DataLoader[Any]) -> dict[str, Any]:
    """The arguments that make `run.loader` do what a ready-made DataLoader would, but for the order's seed."""
    kind = type(loader)
    if kind.__iter__ is not DataLoader.__iter__ or kind._get_iterator is not DataLoader._get_iterator:
        raise UsageError(
            f"{kind.__name__} makes its batches in a way of its own, which run.loader can't shard or resume.",
            hint="Give its dataset: run.loader(dataset, batch_size=..., collate_fn=...).",
        )
    taken: dict[str, Any] = {
        "collate_fn": loader.collate_fn,
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "persistent_workers": loader.persistent_workers,
    }
    if loader.num_workers:
        taken["prefetch_factor"] = loader.prefetch_factor
        taken["multiprocessing_context"] = loader.multiprocessing_context
    if getattr(loader, "pin_memory_device", ""):
        taken["pin_memory_device"] = loader.pin_memory_device
    if not getattr(loader, "in_order", True):
        taken["in_order"] = False
    if isinstance(loader.dataset, IterableDataset):
        return {**taken, "batch_size": loader.batch_size, "drop_last": loader.drop_last}
    if loader.batch_sampler is None:
        return {**taken, "batch_size": None, "sampler": loader.sampler}
    return {**taken, **batching_of(loader.batch_sampler)}


def batching_of(batch_sampler: Any) -> dict[str, Any]:
    """torch's own BatchSampler as what it is made of, so that its batches can be dealt sample by sample."""
    if type(batch_sampler) is not BatchSampler:
        return {"batch_size": None, "batch_sampler": batch_sampler}
    return {
        "batch_size": batch_sampler.batch_size,
        "drop_last": batch_sampler.drop_last,
        "sampler": batch_sampler.sampler,
    }
