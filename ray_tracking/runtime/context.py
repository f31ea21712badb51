"""The `run` that a training function gets: its place among the ranks, its loops, its logging, its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch

from ray_tracking.config import Config
from ray_tracking.errors import UsageError
from ray_tracking.log import get_logger
from ray_tracking.runtime.agenda import Agenda
from ray_tracking.runtime.batches import to_device
from ray_tracking.runtime.body import StepBody
from ray_tracking.runtime.collective import all_true
from ray_tracking.runtime.hangs import Pulse
from ray_tracking.runtime.loading.loader import ResumableLoader
from ray_tracking.runtime.parallel import Parallel, parallelize, without_exchange
from ray_tracking.runtime.saving import Saver
from ray_tracking.runtime.stopping import Stopping, TrainingStopped
from ray_tracking.tracking.base import ExperimentTracker

log = get_logger()


class Position:
    """The step that training is at; shared with the log calls, which read it."""

    def __init__(self) -> None:
        self.step = 0

    @property
    def here(self) -> int:
        return self.step


class Run:
    """One rank of a run. Steps count from 1: the body of the first batch runs with `step == 1`.

    On ranks other than 0 the log calls but `log_rank_metrics` do nothing. `epochs`, `steps`, `restore`, `checkpoint`
    and `should_stop` must be called by all ranks alike.
    """

    def __init__(
        self,
        config: Config,
        *,
        rank: int,
        world_size: int,
        local_rank: int,
        device: torch.device,
        attempt: int,
        position: Position,
        tracker: ExperimentTracker,
        log_rank_metrics: Callable[..., None],
        saver: Saver,
        agenda: Agenda,
        latest: Callable[[], dict[str, float]],
        announce: Callable[[int], None],
        pulse: Pulse,
    ) -> None:
        self.config = config
        self.params: dict[str, Any] = dict(config.params)
        self.rank = rank
        self.world_size = world_size
        self.local_rank = local_rank
        self.device = device
        self.attempt = attempt
        self.epoch = 0
        self.total_epochs: int | None = None
        self._position = position
        self.tracker = tracker
        self.log_metrics = tracker.log_metrics
        self.log_rank_metrics = log_rank_metrics
        """Numbers of each rank, which every rank logs: shown as `key/mean`, `key/min` and `key/max` over the ranks."""
        self.log_params = tracker.log_params
        self.log_histogram = tracker.log_histogram
        self.log_text = tracker.log_text
        self.log_image = tracker.log_image
        self.log_artifact = tracker.log_artifact
        self.checkpoints = saver
        self._agenda = agenda
        self._latest = latest
        self._announce = announce
        self._pulse = pulse
        self._loaders: list[ResumableLoader] = []
        self._first_epoch = 0
        self._in_epochs = False
        self._epochs_done = False
        self._due: str | None = None
        self._prepared = False
        self._body = StepBody()
        self._stepping: Any = None
        """The loader that `steps` went through last."""
        self._stopping = Stopping()

    @property
    def step(self) -> int:
        """Optimizer steps begun: 0 before the first."""
        return self._position.step

    @step.setter
    def step(self, step: int) -> None:
        self._position.step = step

    # --- what is trained ------------------------------------------------------------------------------------

    def prepare(self, model: torch.nn.Module, parallel: Parallel | None = "ddp", **options: Any) -> torch.nn.Module:
        """The model on this rank's device, and, if there are several ranks, spread over them from rank 0's weights.

        "ddp": whole on each, in DistributedDataParallel; "fsdp": in shards (fully_shard of each of its blocks, then of
        the rest); None: not at all. `options` go to these. Build the optimizer afterwards, and give run.restore both.
        """
        return parallelize(model, self.device, self.world_size, parallel, **options)

    def loader(
        self,
        data: Any,
        batch_size: int | None = 0,
        *,
        shuffle: bool | None = None,
        drop_last: bool = False,
        sharded: bool = False,
        shuffle_buffer: int = 0,
        **options: Any,
    ) -> ResumableLoader:
        """A loader sharded by rank and resumable inside an epoch.

        `data`: a map-style dataset (shuffled unless shuffle=False), an iterable one, or a ready-made DataLoader, whose
        options are taken over (the seed is the run's). `batch_size` is per rank; None takes the items as they are.
        `options` go to torch's DataLoader (num_workers, collate_fn, sampler, batch_sampler, ...). Iterable data must
        give the same samples each time it is read: every rank reads all of it and keeps its part, unless `sharded`
        says that it is split by rank (and by get_worker_info) already; `shuffle_buffer` samples are mixed among each
        other, in memory. What the data draws from the global Python, NumPy and torch random numbers is the same after
        an interruption.
        """
        loader = ResumableLoader(
            data,
            batch_size,
            shuffle=shuffle,
            seed=self.config.seed,
            rank=self.rank,
            world_size=self.world_size,
            drop_last=drop_last,
            sharded=sharded,
            shuffle_buffer=shuffle_buffer,
            **options,
        )
        self._loaders.append(loader)
        return loader

    def restore(self, **objects: Any) -> bool:
        """Load the newest valid checkpoint into the objects, in place; they are what checkpoints hold from now on.

        Give everything that training changes: model=, optimizer=, scheduler=, loader=, or anything with state_dict()
        and load_state_dict(). Returns whether there was a checkpoint. Raises CheckpointError if one does not fit.
        """
        self._body.watch(objects.values())
        with self._pulse.storing():
            info = self.checkpoints.restore(objects)
        if info is None:
            return False
        if info.step != self.checkpoints.newest_step:  # the newest was damaged: what came after this one is superseded
            self._announce(info.step)
        self.step, self._first_epoch = info.step, info.epoch
        log.info("restored", step=info.step, epoch=info.epoch, folder=info.folder)
        return True

    # --- loops ----------------------------------------------------------------------------------------------

    def epochs(self, total: int) -> Iterator[int]:
        """The epochs from the interrupted one (or 0) to `total` - 1. What is due is saved at each epoch's end."""
        self.total_epochs = total
        for epoch in range(self._first_epoch, total):
            self.epoch = epoch
            for loader in self._loaders:
                loader.begin_epoch(epoch)
            self._in_epochs = True
            yield epoch
            self._pulse.count += 1
            if self._stopping.told and self._body.was_left and not _is_finished(self._stepping):
                self._leave()  # the function has left the epoch early because of the stop: it is to be gone on with
            self._in_epochs = False
            # From here the position is the next epoch's beginning: that is what a checkpoint must say.
            for loader in self._loaders:
                loader.begin_epoch(epoch + 1)
            self._first_epoch = epoch + 1
            reason, self._due = self._due or self._why_due(epoch_end=True), None
            if reason is not None:
                self._save(reason)
            if epoch + 1 < total and self._stopping.must_leave(self._agenda.meetings_since_stop, epoch_end=True):
                self._leave()
        self._epochs_done = True

    def steps(self, loader: Any) -> Iterator[Any]:
        """The batches left in the epoch, on the device; advances `step`, and saves as the strategy says.

        If the run is asked to end early, all ranks save after the same step and the training function is left from
        here, by TrainingStopped; one that asks `should_stop` is left to it for a while first.
        """
        self._stepping = loader
        for batch in loader:
            self.step += 1
            self._pulse.count += 1
            self._pulse.step += 1
            with self._body:
                yield to_device(batch, self.device)
            self._agenda.after_step()
            if not self._prepared:
                self._prepared = True
                self.checkpoints.prepare()
            reason = self._why_due()
            if self._in_epochs and _is_finished(loader):
                self._due = reason or self._due  # saved at the epoch's end, when its validation is known
                continue
            if reason is not None:
                self._save(reason)
            if self._stopping.must_leave(self._agenda.meetings_since_stop):
                self._leave()

    def checkpoint(self, force: bool = False, metrics: Mapping[str, Any] | None = None) -> bool:
        """Save now if the strategy asks for it, or in any case with `force`. Call it after the optimizer's step.

        `metrics` stand in the checkpoint beside the last logged ones. Returns whether a save was started.
        """
        if not self.checkpoints.has_objects:
            raise UsageError(
                "There is nothing to save yet.",
                hint="Call run.restore(model=model, optimizer=optimizer, loader=loader) before the first step.",
            )
        given = {str(key): float(value) for key, value in (metrics or {}).items()}
        value = given.get(self.checkpoints.strategy.monitor)
        reason = "asked for" if force else self._why_due(None if value is None else lambda: value)
        return reason is not None and self._save(reason, given)

    def should_stop(self) -> bool:
        """Whether training has been asked to end early; the same answer on every rank, within about a second.

        A function that asks can end in its own way: return after an optimizer's step, and the state is saved. If it
        has not within about half a minute, or by the epoch's end, it is left as one that never asks.
        """
        self._agenda.after_step()
        return self._stopping.ask(self._agenda.stop)

    def no_sync(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        """For gradient accumulation: no gradient exchange inside, of a model from `prepare`."""
        return without_exchange(model)

    # --- inside ---------------------------------------------------------------------------------------------

    def standing_still(self) -> AbstractContextManager[None]:
        """Inside, this rank waits for something other than training, and does not pass for one that hangs."""
        return self._pulse.storing()

    def finish(self) -> None:
        """After the training function: the state at its end is a checkpoint too, if the strategy says so."""
        self._pulse.count += 1
        if self.was_stopped:
            self._save_to_resume()
        elif self.checkpoints.has_objects and self.step > 0:
            reason = self._why_due(ended=True)
            if reason is not None:
                self._save(reason)
        elif self.step > 0:
            log.warning(
                "no checkpoint was saved: the training function never called run.restore(model=..., optimizer=...)"
            )
        self.close()

    def close(self) -> None:
        """Wait until all checkpoints are written. Raises CheckpointError if one is not and the run is to fail then."""
        with self._pulse.storing():
            self.checkpoints.close()

    @property
    def was_stopped(self) -> bool:
        """Whether the training function has returned because `should_stop` said so, before it was through."""
        return self._stopping.told and not self._epochs_done

    def save_after(self, error: BaseException) -> None:
        """The training function raised: keep what it had reached, if that is a state between two steps.

        In the middle of a step the random numbers of half a step are drawn and its batch is lost: resumed there,
        training would not go on as if nothing had happened. Then the last checkpoint stands.
        """
        if self.checkpoints.has_objects and self.step > 0 and self._body.is_whole:
            self.checkpoints.save_alone(self.step, self._epoch_to_resume(), self._latest(), error)
        self.checkpoints.finish_writing()

    def position(self) -> dict[str, Any]:
        """Where training is, for the progress line."""
        first = self._loaders[0] if self._loaders else None
        per_epoch = first.steps_per_epoch if first is not None else None
        total = per_epoch * self.total_epochs if per_epoch and self.total_epochs else None
        return {
            "step": self.step,
            "total_steps": total,
            "epoch": self.epoch,
            "total_epochs": self.total_epochs,
        }

    def _monitored(self) -> float | None:
        """The newest value of the monitor logged since the last checkpoint's step, on rank 0."""
        return self._latest().get(self.checkpoints.strategy.monitor)

    def _why_due(
        self, metric: Callable[[], float | None] | None = None, *, epoch_end: bool = False, ended: bool = False
    ) -> str | None:
        timed, preempted = self._agenda.take()
        return self.checkpoints.why_due(
            self.step,
            metric or self._monitored,
            epoch_end=epoch_end,
            timed=timed,
            preempted=preempted,
            ended=ended,
        )

    def _epoch_to_resume(self) -> int:
        """The epoch that the loaders stand in. Between two, and after the last, that is no longer `epoch`."""
        return self.epoch if self.total_epochs is None else self._first_epoch

    def _save(self, reason: str, metrics: Mapping[str, float] | None = None) -> bool:
        latest = {**self._latest(), **(metrics or {})}
        with self._pulse.storing():
            return self.checkpoints.save(self.step, self._epoch_to_resume(), latest, reason)

    def _leave(self) -> NoReturn:
        """End early, on all ranks alike."""
        self._save_to_resume()
        raise TrainingStopped("the run was asked to end early")

    def _save_to_resume(self) -> None:
        """The last checkpoint of a run that is stopped: nothing that was trained is to be trained again."""
        if not self.checkpoints.has_objects or self.step == 0:
            return
        if not all_true(self._body.is_whole):
            log.warning(
                "stopped in the middle of a step: the last checkpoint stands",
                fix="ask run.should_stop() after the optimizer's step",
            )
            return
        with self._pulse.storing():
            self.checkpoints.finish_writing()  # so that there is room, whatever is to be done when there is none
        self._save("stop requested")


def _is_finished(loader: Any) -> bool:
    """Whether the epoch has no batches left; False for a loader that can't tell."""
    return bool(getattr(loader, "finished", False))
