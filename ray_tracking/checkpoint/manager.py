"""Saving and loading checkpoints from a plain script: copies on the caller's thread, writes on one of its
own.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from ray_tracking.checkpoint.loaded import TrainingCheckpoint
from ray_tracking.checkpoint.manifest import CheckpointInfo
from ray_tracking.checkpoint.retention import apply_retention
from ray_tracking.checkpoint.state import Snapshot, capture
from ray_tracking.checkpoint.store import CheckpointStore
from ray_tracking.checkpoint.strategy import CheckpointStrategy, as_mapping
from ray_tracking.errors import CheckpointError, ConfigError, StorageError, UsageError
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
    ) -> None:
        self.store = store
        self.strategy = strategy or CheckpointStrategy()
        self.rank = rank
        self.world_size = world_size
        self._save_id = save_id
        self._last_step: int | None = None
        self._last_time = time.monotonic()
        self._best: float | None = None
        self._sequence: int | None = None  # of the newest on storage; known after the first look
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._asked: tuple[int, float] | None = None
        self._warned = False
        atexit.register(_finish, weakref.ref(self))

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
        reason = self.strategy.should_save(
            step,
            value,
            best_so_far=self._best,
            last_saved_step=self._last_step,
            seconds_since_last=time.monotonic() - self._last_time,
            epoch_end=epoch_end,
        )
        return reason is not None

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
    ) -> str:
        """Copy the state and write it in the background (`blocking`: before returning). Returns the
        folder's path.

        Each object has `state_dict()` or is a state itself. Blocks while the previous save is still being
        written.
        Raises CheckpointError if that one failed, or naming the value that can't be stored; then nothing
        was written.
        """
        self.wait()
        self._look()
        given = {"model": model, "optimizer": optimizer, "scheduler": scheduler, **objects}
        if all(value is None for value in given.values()):
            raise UsageError("save_checkpoint was given nothing to save.", hint="Pass model=, optimizer= and so on.")
        # One process numbers its saves, so that a script started over in an old directory counts as newer.
        # Several ranks
        # can't agree without talking; they write into their attempt's folder, where the step orders.
        alone = self.world_size == 1
        sequence = max(step, (self._sequence or 0) + 1) if alone else step
        snapshot = capture(
            given,
            step=step,
            epoch=epoch,
            metrics=self._with_monitor(step, metrics or {}),
            rank=self.rank,
            world_size=self.world_size,
            sequence=sequence,
            save_id=self._save_id,
        )
        folder = self.store.new_folder(step) if alone else self.store.folder_of(step)
        self._note(snapshot)
        self._thread = threading.Thread(
            target=self._write, args=(folder, snapshot), name=f"checkpoint-{step}", daemon=False
        )
        self._thread.start()
        if blocking:
            self.wait()
        return self.store.storage.path(folder)

    def wait(self) -> None:
        """Return when the last save is complete; raises CheckpointError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            self._sequence = self._last_step = None  # what was noted of it did not happen: look again
            raise CheckpointError(
                f"The last checkpoint was not saved: {error}",
                hint="The one before it is intact. Make room or fix the storage, then save again.",
            ) from error

    def load_latest_checkpoint(self) -> TrainingCheckpoint | None:
        """The newest that loads (a damaged one is named in a warning and the one before it used), None if
        there is none.
        """
        self.wait()
        if self.world_size == 1:
            return self.store.load_latest()
        # Each rank reads other files, so one might pass over what another takes: all of them check all files.
        info = self.store.latest_valid()
        return None if info is None else self.store.load(info, rank=self.rank, world_size=self.world_size)

    def load_best_checkpoint(self) -> TrainingCheckpoint | None:
        """The best by the strategy's monitor; None if no checkpoint has a finite value of it."""
        self.wait()
        infos = self.store.checkpoints()
        ranked = self.strategy.ranked(infos)
        if infos and not ranked:
            known = sorted({key for info in infos for key in info.metrics})
            _log.warning("no checkpoint has the monitored metric", monitor=self.strategy.monitor, metrics=known)
        return self.store.load_first(ranked, rank=self.rank, world_size=self.world_size)

    def load_checkpoint(self, step: int) -> TrainingCheckpoint | None:
        """The checkpoint of `step`, None if there is none; raises CheckpointCorruptError if it is damaged."""
        self.wait()
        info = self.store.find(step)
        return None if info is None else self.store.load(info, rank=self.rank, world_size=self.world_size)

    def list_checkpoints(self) -> list[CheckpointInfo]:
        """The complete checkpoints, oldest first."""
        self.wait()
        return self.store.checkpoints()

    def verify(self, step: int | None = None) -> dict[int, list[str]]:
        """Read all bytes of all checkpoints (or of one step): step -> problems, each naming a file; empty
        lists are good.
        """
        self.wait()
        return {info.step: self.store.verify(info) for info in self.store.checkpoints() if step in (None, info.step)}

    def close(self) -> None:
        """Wait for the last save; raises like `wait`."""
        self.wait()

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

    def _note(self, snapshot: Snapshot) -> None:
        self._last_step, self._last_time, self._sequence = snapshot.step, time.monotonic(), snapshot.sequence
        value = snapshot.metrics.get(self.strategy.monitor)
        if self.strategy.improves(value, self._best):
            self._best = value

    def _write(self, folder: str, snapshot: Snapshot) -> None:
        try:
            self.store.write_snapshot(folder, snapshot)
        except Exception as error:  # noqa: BLE001 - on a thread of its own: kept for wait() and the next save
            self._error = error
            _log.warning("checkpoint not saved", step=snapshot.step, folder=folder, error=str(error))
            return
        if self.rank == 0:
            try:
                apply_retention(self.store, self.strategy)
            except StorageError as error:
                _log.warning("old checkpoints not deleted, tried again after the next save", error=error.message)


def _finish(reference: weakref.ref[CheckpointManager]) -> None:
    """At exit: the writing threads are done by then (they are no daemons); say what nobody asked about."""
    manager = reference()
    if manager is not None:
        try:
            manager.wait()
        except CheckpointError as error:
            _log.error("the last checkpoint of this process is missing", reason=error.message)


def open_store(checkpoint_dir: str | None) -> CheckpointStore:
    """The store in `checkpoint_dir` (a path or URI), or in `checkpoints` below the default storage."""
    if checkpoint_dir:
        return CheckpointStore(Storage.open(checkpoint_dir))
    return CheckpointStore(Storage.open(os.environ.get("RAY_TRACKING_STORAGE") or "./runs").child("checkpoints"))


def create_checkpoint_manager(config: Any = None) -> CheckpointManager:
    """A manager from `config["training"]["default"]`: a mapping, a pydantic section or None. ConfigError
    for bad values.
    """
    section = as_mapping(config)
    for key in ("compression", "encryption"):
        if section.get(key):
            raise ConfigError(
                f"training.default.{key} is set, but this version can't do it yet.",
                hint=f"Set training.default.{key} to null.",
            )
    return CheckpointManager(open_store(section.get("checkpoint_dir")), CheckpointStrategy.from_config(section))
