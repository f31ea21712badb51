"""A data loader sharded by rank that can be resumed inside an epoch, also at another world size.

In: a map-style or iterable dataset, or a ready-made DataLoader. Out: this rank's batches, and a position: where in
which pass of which epoch all ranks together are. Which samples come where depends on the seed and the epoch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from ray_tracking.errors import UsageError
from ray_tracking.log import get_logger
from ray_tracking.runtime.collective import all_true, broadcast
from ray_tracking.runtime.loading.mapped import MappedSource
from ray_tracking.runtime.loading.place import Place
from ray_tracking.runtime.loading.sampling import order_of
from ray_tracking.runtime.loading.streams import StreamSource, check_stream
from ray_tracking.runtime.loading.torchloader import arguments_of, batching_of

log = get_logger()


class ResumableLoader:
    """What `run.loader` returns. Iterating gives the batches left in the current pass over the data.

    A batch that was handed out is consumed, also if the loop is left after it. Once a pass is through, the next
    iteration begins another, with an order of its own; so does `begin_epoch`. Without epochs the passes just follow
    each other. One loader serves one loop: `run.restore` is for those that are trained from, not for validation.
    """

    rank_own_state = True
    """Every rank's state is stored: a dataset may have one of its own."""

    def __init__(
        self,
        data: Any,
        batch_size: int | None = 0,
        *,
        shuffle: bool | None = None,
        seed: int,
        rank: int,
        world_size: int,
        drop_last: bool = False,
        agree: Callable[[bool], bool] = all_true,
        share: Callable[[Any], Any] = broadcast,
        sharded: bool = False,
        shuffle_buffer: int = 0,
        **options: Any,
    ) -> None:
        asked = {"batch_size": batch_size, "shuffle": shuffle, "drop_last": drop_last, **options}
        if isinstance(data, DataLoader):
            asked, data = _taken_over(data, asked), data.dataset
        elif "batch_sampler" in asked:
            asked = _with_batching(asked)
        self.dataset = data
        self.batch_size: int | None = asked.pop("batch_size")
        shuffle, sampler, batch_sampler = (asked.pop(name, None) for name in ("shuffle", "sampler", "batch_sampler"))
        common: dict[str, Any] = {
            "rank": rank,
            "world_size": world_size,
            "drop_last": asked.pop("drop_last", False),
            "collate": asked.pop("collate_fn", None),
            "options": asked,
        }
        _check_size(self.batch_size)
        self._source: MappedSource | StreamSource
        if _is_map_style(data):
            _refuse("an iterable dataset", sharded=sharded, shuffle_buffer=shuffle_buffer)
            if sampler is not None and shuffle:
                raise UsageError("shuffle and sampler can't both be given: the sampler makes the order.")
            order = order_of(len(data), shuffle, sampler, batch_sampler, share)
            self._source = MappedSource(data, self.batch_size, order, **common)
        else:
            check_stream(data)
            _refuse("a map-style dataset", sampler=sampler, batch_sampler=batch_sampler, shuffle=shuffle)
            self._source = StreamSource(
                data, self.batch_size, agree=agree, sharded=sharded, shuffle_buffer=_buffer(shuffle_buffer), **common
            )
        if type(sampler) is DistributedSampler and rank == 0:
            log.info("run.loader shards in place of the DistributedSampler: no sample is repeated to even out ranks")
        self._rank = rank
        self._place = Place(seed)
        self._expected = False
        self._iterations = 0
        self._epochs_begun = 0

    def __len__(self) -> int:
        """Steps in a whole pass, from its beginning. TypeError if the data does not know its length."""
        return len(self._source)

    @property
    def steps_per_epoch(self) -> int | None:
        """`len`, or None where that is unknown."""
        try:
            return len(self._source)
        except TypeError:
            return None

    @property
    def epoch(self) -> int:
        return self._place.epoch

    @property
    def consumed(self) -> int:
        """Samples of the pass that all ranks have been given (batches, where a batch sampler makes them)."""
        return self._place.consumed

    @property
    def finished(self) -> bool:
        """Whether the current pass has no batches left."""
        return self._place.finished

    def begin_epoch(self, epoch: int) -> None:
        """Go to an epoch: its beginning, or the position inside it that was restored.

        A restored position at the epoch's end is kept: the next iteration gives nothing, once.
        """
        self._expected = True
        if epoch != self.epoch:
            self._epochs_begun += 1
            self._place = Place(self._place.seed, epoch)

    def __iter__(self) -> Iterator[Any]:
        """The batches left. The position moves when a batch is handed out: who has a batch has consumed it."""
        self._iterations += 1
        iteration, epochs_begun = self._iterations, self._epochs_begun
        if self.finished and not self._expected:
            self._place = Place(self._place.seed, self.epoch, self._place.turn + 1)
        self._expected = False
        if self.finished:
            return
        for handed in self._source.open(self._place):
            self._place = replace(self._place, consumed=handed.consumed, finished=handed.finished, marks=handed.marks)
            yield handed.batch
            if self._epochs_begun != epochs_begun:
                return  # the epoch that this iteration was about is over
            if self._iterations != iteration:
                raise UsageError(
                    "A loader was iterated again inside its own loop: its batches are given once, to one of them.",
                    hint="Make a second loader of the same data: run.loader(dataset, ...).",
                )
        if not self.consumed:
            raise UsageError(f"The {type(self.dataset).__name__} gave no batch: on some rank there is no data.")
        self._place = replace(self._place, finished=True)

    def state_dict(self) -> dict[str, Any]:
        """The position; the same on every rank, but for the key `own` of a dataset that is split already."""
        place = self._place
        return {
            "seed": place.seed,
            "epoch": place.epoch,
            "turn": place.turn,
            "consumed": place.consumed,
            "finished": place.finished,
            **self._described(),
            "marks": dict(place.marks),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position, with its seed. What does not fit the data any more is said in the log."""
        self._epochs_begun += 1
        self._expected = False
        self._place = Place(
            seed=state["seed"],
            epoch=state["epoch"],
            turn=state.get("turn", 0),
            consumed=state["consumed"],
            finished=state.get("finished", False),
            marks=state.get("marks", {}),
        )
        now = self._described()
        for name, changed in _CHANGED.items():
            before = state.get(name, now[name])
            if before != now[name] and self._rank == 0:
                (log.info if name == "batch_size" else log.warning)(changed, before=before, now=now[name])
        if state.get("unit", now["unit"]) != now["unit"]:
            self._place = Place(state["seed"], state["epoch"])

    def _described(self) -> dict[str, Any]:
        source = self._source
        return {
            "batch_size": self.batch_size,
            "samples": source.samples,
            "order": source.kind,
            "unit": source.unit,
        }


_CHANGED = {
    "batch_size": "another batch size than before the interruption: the samples left in the epoch are dealt anew",
    "samples": "another number of samples in the dataset than before the interruption: some may be missed or "
    "given twice in this epoch",
    "order": "another order of samples than before the interruption: some may be missed or given twice in this epoch",
    "unit": "the position was saved in another unit (batches of a batch sampler, or samples): the epoch begins anew",
}
"""What a checkpoint remembers of the data, and what is said when it is different now."""


def _taken_over(loader: DataLoader[Any], asked: dict[str, Any]) -> dict[str, Any]:
    unset = {"batch_size": 0, "shuffle": None, "drop_last": False}
    given = [name for name, value in asked.items() if name not in unset or value != unset[name]]
    if given:
        raise UsageError(
            f"run.loader takes {', '.join(given)} from the DataLoader it is given; they can't be given beside it.",
            hint="Set them where the DataLoader is made, or give its dataset instead.",
        )
    return arguments_of(loader)


def _with_batching(asked: dict[str, Any]) -> dict[str, Any]:
    if asked["batch_size"] or asked["shuffle"] or asked["drop_last"] or "sampler" in asked:
        raise UsageError("batch_sampler can't be given together with batch_size, shuffle, sampler or drop_last.")
    return {**asked, **batching_of(asked.pop("batch_sampler"))}


def _is_map_style(data: Any) -> bool:
    if isinstance(data, IterableDataset):
        return False
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return True
    if hasattr(data, "__iter__"):
        return False
    raise UsageError(
        f"run.loader can't read a {type(data).__name__}: it has neither __len__ and __getitem__ nor __iter__.",
        hint="Give a map-style dataset, an iterable dataset, or a DataLoader.",
    )


def _refuse(wanted: str, **given: Any) -> None:
    wrong = [name for name, value in given.items() if value]
    if not wrong:
        return
    raise UsageError(
        f"{', '.join(wrong)} can be given for {wanted} only.",
        hint="shuffle_buffer=10_000 shuffles an iterable dataset." if "shuffle" in wrong else None,
    )


def _check_size(batch_size: int | None) -> None:
    if batch_size is not None and batch_size < 1:
        raise UsageError(
            f"batch_size is {batch_size}; it must be at least 1 (per worker).",
            hint="Give it: run.loader(dataset, batch_size=64); batch_size=None takes the items as they are.",
        )


def _buffer(size: int) -> int:
    if size < 0:
        raise UsageError(f"shuffle_buffer is {size}; it must be 0 (no shuffling) or the number of samples to mix.")
    return size if size > 1 else 0
