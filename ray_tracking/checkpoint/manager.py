"""Saving and loading checkpoints from a plain script: copied on the caller's thread, written by another process."""

from __future__ import annotations

import atexit
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from ray_tracking.checkpoint.keys import Keyring
from ray_tracking.checkpoint.loaded import TrainingCheckpoint
from ray_tracking.checkpoint.manifest import CheckpointInfo, Manifest
from ray_tracking.checkpoint.sizing import once_known
from ray_tracking.checkpoint.staging import Stager
from ray_tracking.checkpoint.state import Description, describe
from ray_tracking.checkpoint.store import CheckpointStore
from ray_tracking.checkpoint.strategy import CheckpointStrategy, as_mapping
from ray_tracking.checkpoint.writer import CheckpointWriter, WriterOptions
from ray_tracking.errors import CheckpointError, UsageError
from ray_tracking.log import get_logger
from ray_tracking.storage import Storage

_log = get_logger()


class CheckpointManager:
    """Saves by a strategy and loads what is complete. One per process; its methods are for one thread, the
    training's.

    With several ranks each has its own manager; all of them save the same steps, rank 0 keeps house.
    """

    def __init__(
        self,
        store: CheckpointStore,
        strategy: CheckpointStrategy | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
        save_id: str = "",
        options: WriterOptions | None = None,
        fail_on_error: bool = False,
    ) -> None:
        self.store = store
        self.strategy = strategy or CheckpointStrategy()
        self.rank = rank
        self.world_size = world_size
        self.failed = 0
        """Checkpoints that could not be written."""
        self._save_id = save_id
        self._fail_on_error = fail_on_error
        self._last_step: int | None = None
        self._last_time = time.monotonic()
        self._best: float | None = None
        self._sequence: int | None = None  # of the newest on storage; known after the first look
        self._writer = CheckpointWriter(store, self.strategy, options)
        self._written: deque[tuple[int, Future[Manifest]]] = deque()
        self._error: Exception | None = None
        self._asked: tuple[int, float] | None = None
        self._warned = False
        self._call_off = once_known(_when_size_known(weakref.ref(self)))
        atexit.register(_finish, weakref.ref(self))

    def prepare(self, **objects: Any) -> None:
        """Provide memory for copies of these objects (model=, optimizer= ...), in the background.

        By itself that happens when an optimizer has stepped twice; a first save before it takes many times longer.
        """
        self._call_off()
        self._writer.prepare(Stager.size_of(self._describe(objects, 0, 0, {}, 0)))

    def should_save_checkpoint(self, step: int, metric: float | None = None, *, epoch_end: bool = False) -> bool:
        """Whether the strategy wants a checkpoint after `step`; `metric` is the monitor's value, needed by
        save_best_only.
        """
        value = None if metric is None else float(metric)
        if value is not None:
            self._asked = (step, value)
        if self.strategy.save_best_only:
            self._look()
            if value is None and not self._warned:
                self._warned = True
                _log.warning("save_best_only saves nothing without the metric", monitor=self.strategy.monitor)
        return self._reason(step, value, epoch_end=epoch_end) is not None

    def save_checkpoint(
        self,
        *,
        step: int,
        epoch: int = 0,
        model: Any = None,
        optimizer: Any = None,
        scheduler: Any = None,
        metrics: Mapping[str, Any] | None = None,
        blocking: bool = False,
        **objects: Any,
    ) -> str | None:
        """Copy the state; another process writes it (`blocking`: before this returns). Returns the folder's path.

        Each object has `state_dict()` or is a state itself. While two copies are still being written: waits for the
        older one, or with `when_busy: skip` saves nothing and returns None.
        Raises CheckpointError naming the value that can't be stored (nothing is written then), or, with
        `on_write_failure: fail`, if an earlier save failed.
        """
        self._settle()
        if self._fail_on_error:
            self._raise_failure()
        self._look()
        given = {"model": model, "optimizer": optimizer, "scheduler": scheduler, **objects}
        if all(value is None for value in given.values()):
            raise UsageError("save_checkpoint was given nothing to save.", hint="Pass model=, optimizer= and so on.")
        if self._writer.options.when_busy == "skip" and not blocking and not self._writer.has_room():
            _log.warning("checkpoint skipped: the ones before it are still being written", step=step)
            return None
        # One process numbers its saves, so that a script started over in an old directory counts as newer.
        # Several ranks can't agree without talking; they write into their attempt's folder, where the step orders.
        alone = self.world_size == 1
        sequence = max(step, (self._sequence or 0) + 1) if alone else step
        description = self._describe(given, step, epoch, self._with_monitor(step, metrics or {}), sequence)
        staged = self._writer.stage(description)
        folder = self.store.new_folder(step) if alone else self.store.folder_of(step)
        self._note(description.manifest)
        self._written.append((step, self._writer.write(staged, folder, keep_house=self.rank == 0)))
        if blocking:
            self.wait()
        return self.store.storage.path(folder)

    def wait(self) -> None:
        """Return when all saves are complete; raises CheckpointError if one failed since the last `wait`."""
        self._settle(wait=True)
        self._raise_failure()

    def load_latest_checkpoint(self) -> TrainingCheckpoint | None:
        """The newest that loads (a damaged one is named in a warning and the one before it used), None if
        there is none.
        """
        self._settle(wait=True)
        if self.world_size == 1:
            return self.store.load_latest()
        # Each rank reads other files, so one might pass over what another takes: all of them check all files.
        info = self.store.latest_valid()
        return None if info is None else self.store.load(info, rank=self.rank, world_size=self.world_size)

    def load_best_checkpoint(self) -> TrainingCheckpoint | None:
        """The best by the strategy's monitor; None if no checkpoint has a finite value of it."""
        self._settle(wait=True)
        infos = self.store.checkpoints()
        ranked = self.strategy.ranked(infos)
        if infos and not ranked:
            known = sorted({key for info in infos for key in info.metrics})
            _log.warning("no checkpoint has the monitored metric", monitor=self.strategy.monitor, metrics=known)
        return self.store.load_first(ranked, rank=self.rank, world_size=self.world_size)

    def load_checkpoint(self, step: int) -> TrainingCheckpoint | None:
        """The checkpoint of `step`, None if there is none; raises CheckpointCorruptError if it is damaged."""
        self._settle(wait=True)
        info = self.store.find(step)
        return None if info is None else self.store.load(info, rank=self.rank, world_size=self.world_size)

    def list_checkpoints(self) -> list[CheckpointInfo]:
        """The complete checkpoints, oldest first."""
        self._settle(wait=True)
        return self.store.checkpoints()

    def verify(self, step: int | None = None) -> dict[int, list[str]]:
        """Read all bytes of all checkpoints (or of one step): step -> problems, each naming a file; empty
        lists are good.
        """
        self._settle(wait=True)
        return {info.step: self.store.verify(info) for info in self.store.checkpoints() if step in (None, info.step)}

    def pin(self, step: int) -> None:
        """Keep the checkpoint of `step` from retention until `unpin`; CheckpointError if there is none."""
        self.store.pin(self._known(step))

    def unpin(self, step: int) -> None:
        self.store.unpin(self._known(step))

    def close(self) -> None:
        """Wait for the saves and end the writing process; raises like `wait`."""
        self._call_off()
        self._settle(wait=True)
        self._writer.close()
        self._raise_failure()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _look(self) -> None:
        """Learn once what an earlier process left: the newest's number and the best value."""
        if self._sequence is not None:
            return
        infos = self.store.checkpoints()
        self._sequence = max((info.sequence for info in infos), default=0)
        best = self.strategy.best(infos)
        self._best = None if best is None else best.metrics[self.strategy.monitor]

    def _with_monitor(self, step: int, metrics: Mapping[str, Any]) -> Mapping[str, Any]:
        """The value `should_save_checkpoint` was asked with belongs to the save, also if `metrics` calls it
        otherwise.
        """
        if self.strategy.monitor not in metrics and self._asked is not None and self._asked[0] == step:
            return {**metrics, self.strategy.monitor: self._asked[1]}
        return metrics

    def _known(self, step: int) -> CheckpointInfo:
        self._settle(wait=True)
        info = self.store.find(step)
        if info is None:
            known = ", ".join(str(each.step) for each in self.store.checkpoints()) or "none"
            raise CheckpointError(f"There is no complete checkpoint of step {step}.", hint=f"There are: {known}.")
        return info

    def _reason(self, step: int, value: float | None, *, epoch_end: bool = False) -> str | None:
        return self.strategy.should_save(
            step,
            value,
            best_so_far=self._best,
            last_saved_step=self._last_step,
            seconds_since_last=time.monotonic() - self._last_time,
            epoch_end=epoch_end,
        )

    def _describe(
        self, objects: Mapping[str, Any], step: int, epoch: int, metrics: Mapping[str, Any], sequence: int
    ) -> Description:
        value = metrics.get(self.strategy.monitor)
        return describe(
            objects,
            step=step,
            epoch=epoch,
            metrics=metrics,
            rank=self.rank,
            world_size=self.world_size,
            sequence=sequence,
            save_id=self._save_id,
            reason=self._reason(step, value) or "asked for",
            improved=self.strategy.improves(value, self._best),
        )

    def _note(self, manifest: Manifest) -> None:
        self._last_step, self._last_time, self._sequence = manifest.step, time.monotonic(), manifest.sequence
        if manifest.improved:
            self._best = manifest.metrics[self.strategy.monitor]

    def _settle(self, *, wait: bool = False) -> None:
        """Take note of the saves that have ended (`wait`: of all)."""
        while self._written and (wait or self._written[0][1].done()):
            step, written = self._written.popleft()
            error = written.exception()
            if error is None:
                continue
            if not isinstance(error, Exception):
                raise error
            self.failed += 1
            self._error = error
            self._sequence = self._last_step = None  # what was noted of it did not happen: look again
            _log.error("checkpoint not saved; the one before it is intact", step=step, error=str(error))

    def _raise_failure(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise CheckpointError(
                f"A checkpoint was not saved: {error}",
                hint="The one before it is intact. Make room or fix the storage, then save again.",
            ) from error


def _when_size_known(reference: weakref.ref[CheckpointManager]) -> Callable[[int], None]:
    def prepare(size: int) -> None:
        manager = reference()
        if manager is not None:
            manager._writer.prepare(size // manager.world_size)

    return prepare


def _finish(reference: weakref.ref[CheckpointManager]) -> None:
    """At exit: what was asked for is written, and what failed is said."""
    manager = reference()
    if manager is not None:
        with suppress(CheckpointError):  # said when it was noticed
            manager.close()


def open_store(checkpoint_dir: str | None, keyring: Keyring | None = None) -> CheckpointStore:
    """The store in `checkpoint_dir` (a path or URI), or in `checkpoints` below the default storage."""
    if checkpoint_dir:
        return CheckpointStore(Storage.open(checkpoint_dir), keyring=keyring)
    storage = Storage.open(os.environ.get("RAY_TRACKING_STORAGE") or "./runs")
    return CheckpointStore(storage.child("checkpoints"), keyring=keyring)


def create_checkpoint_manager(config: Any = None) -> CheckpointManager:
    """A manager from `config["training"]["default"]`: a mapping, a pydantic section or None. ConfigError
    for bad values.
    """
    section = as_mapping(config)
    strategy = CheckpointStrategy.from_config(section)
    options = WriterOptions.from_config(section)
    store = open_store(section.get("checkpoint_dir"), options.keyring)
    return CheckpointManager(store, strategy, options=options, fail_on_error=section.get("on_write_failure") == "fail")
