"""Checkpoints of a run on Ray: asked of the strategy, copied on the training thread, written and registered beside it.

Writing has a thread of its own. Ray registers one report per look of its controller and would hold back the next
write until then: checkpoints that come faster than that would pile up in memory, and a crash would lose them.

In: the live objects of `run.restore`, steps, metrics. Out: checkpoint folders below the run, reported to Ray Train.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ray.train
from ray.train import Checkpoint, CheckpointUploadMode

from ray_tracking.checkpoint import (
    CheckpointStore,
    CheckpointStrategy,
    Snapshot,
    TrainingCheckpoint,
    apply_retention,
    capture,
    restore,
)
from ray_tracking.checkpoint.manifest import CheckpointInfo, step_folder
from ray_tracking.errors import CheckpointCorruptError, RayTrackingError
from ray_tracking.log import get_logger
from ray_tracking.runtime.collective import all_true, broadcast

log = get_logger()

_UNWRITTEN = 2
"""Copies of the state that may wait to be written."""
_SECONDS_ASKED_EVERY = 10
"""Steps between two looks at save_every_seconds: the ranks have to agree, which costs a message."""


class Saver:
    """Saves and restores one rank's share. Its methods are called by all ranks alike, on the training thread.

    `before_commit` runs on rank 0 before a checkpoint can become complete: what was logged up to it must be durable.
    """

    def __init__(
        self,
        store: CheckpointStore,
        strategy: CheckpointStrategy,
        *,
        rank: int,
        world_size: int,
        attempt: int,
        before_commit: Callable[[], object],
    ) -> None:
        self.strategy = strategy
        self.failed = 0
        """Checkpoints of this attempt that could not be written."""
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._attempt = attempt
        self._before_commit = before_commit
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self._room = threading.Semaphore(_UNWRITTEN)
        self._objects: dict[str, Any] = {}
        self._last_step: int | None = None
        self._last_time = time.monotonic()
        found = store.scan() if rank == 0 else []
        self._taken = {item.folder.rpartition("/")[2] for item in found}
        best = strategy.best([item.info for item in found if item.info is not None])
        self._best = None if best is None else best.metrics[strategy.monitor]
        self._candidates: list[CheckpointInfo] = broadcast([item.info for item in found if item.info is not None])

    @property
    def newest_step(self) -> int:
        """The step of the newest complete checkpoint when the attempt began, -1 if there was none."""
        return self._ordered()[0].step if self._candidates else -1

    def _ordered(self) -> list[CheckpointInfo]:
        return sorted(self._candidates, key=lambda info: info.order, reverse=True)

    def restore(self, objects: Mapping[str, Any]) -> TrainingCheckpoint | None:
        """Load the newest checkpoint that verifies on every rank into `objects`; they are what is saved from now on.

        None if the run has no checkpoint yet. Raises CheckpointCorruptError if it has some and none can be used.
        """
        self._objects = {name: value for name, value in objects.items() if value is not None}
        for info in self._ordered():
            try:
                loaded = self._store.load(info, rank=self._rank, world_size=self._world_size)
            except (RayTrackingError, FileNotFoundError) as error:
                log.error("checkpoint not usable, trying the one before it", step=info.step, reason=str(error))
                loaded = None
            if not all_true(loaded is not None) or loaded is None:
                continue
            restore(loaded, self._objects, rng=True)
            self._last_step = loaded.step
            if loaded.world_size != self._world_size:
                log.warning(
                    "resumed at another world size: the samples left in the epoch are dealt anew",
                    saved_with=loaded.world_size,
                    now=self._world_size,
                )
            return loaded
        if self._candidates:
            raise CheckpointCorruptError(
                f"None of the {len(self._candidates)} checkpoints of the run can be used; starting from the beginning "
                "would throw away what was trained.",
                hint="The log names what is wrong with each. Start a new run, or move the attempt folders away.",
            )
        return None

    @property
    def has_objects(self) -> bool:
        return bool(self._objects)

    def is_due(self, step: int, metric: Callable[[], float | None], *, epoch_end: bool = False) -> bool:
        """Ask the strategy, the same answer on every rank. `metric` gives the monitor's newest value on rank 0."""
        if not self._objects:
            return False
        timed = self.strategy.save_every_seconds is not None and step % _SECONDS_ASKED_EVERY == 0
        if not (timed or epoch_end or self.strategy.save_best_only):
            return self._ask(step, None, epoch_end) is not None
        if self.strategy.save_best_only and not epoch_end and self._could_save(step, epoch_end) is None:
            return False
        reason = self._ask(step, metric(), epoch_end) if self._rank == 0 else None
        return bool(broadcast(reason))

    def _could_save(self, step: int, epoch_end: bool) -> str | None:
        """Whether anything but the metric asks for a save: decided alike on every rank without a message."""
        steps = self.strategy.save_steps
        timed = self.strategy.save_every_seconds is not None and step % _SECONDS_ASKED_EVERY == 0
        return "may be" if timed or epoch_end or (steps is not None and step % steps == 0) else None

    def _ask(self, step: int, metric: float | None, epoch_end: bool) -> str | None:
        return self.strategy.should_save(
            step,
            metric,
            best_so_far=self._best,
            last_saved_step=self._last_step,
            seconds_since_last=time.monotonic() - self._last_time,
            epoch_end=epoch_end,
        )

    def save(self, step: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """Copy the state now; it is written, and the checkpoint registered with Ray Train, while training goes on.

        Waits while earlier copies are still being written, so that memory stays bounded.
        """
        if step == self._last_step:
            return
        self._room.acquire()
        snapshot = capture(
            self._objects,
            step=step,
            epoch=epoch,
            metrics=metrics,
            rank=self._rank,
            world_size=self._world_size,
            save_id=f"attempt-{self._attempt}",
        )
        value = metrics.get(self.strategy.monitor)
        if self.strategy.improves(value, self._best):
            self._best = value
        self._last_step, self._last_time = step, time.monotonic()
        storage = ray.train.get_context().get_storage()
        folder = broadcast(self._folder_name(step) if self._rank == 0 else None)
        written = self._writer.submit(self._write, snapshot, folder)
        del snapshot  # the writer's alone: what waits to be registered must hold no copy
        ray.train.report(
            {"step": step, "epoch": epoch, **metrics},
            checkpoint=Checkpoint(storage.experiment_fs_path, storage.storage_filesystem),
            checkpoint_dir_name=folder,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=False,
            checkpoint_upload_fn=lambda _checkpoint, name: _when_written(written, storage, name),
        )

    def _folder_name(self, step: int) -> str:
        """A name that no earlier try has used."""
        trial = 1
        while step_folder(step, trial) in self._taken:
            trial += 1
        name = step_folder(step, trial)
        self._taken.add(name)
        return name

    def _write(self, snapshot: Snapshot, folder: str) -> None:
        """On the writer thread. A failure is said and counted; training goes on with the checkpoints it has."""
        path = f"{self._store.folder}/{folder}" if self._store.folder else folder
        try:
            if self._rank == 0:
                self._before_commit()
            self._store.write_snapshot(path, snapshot)
            if self._rank == 0:
                apply_retention(self._store, self.strategy)
        except (RayTrackingError, OSError) as error:
            self.failed += 1
            log.error(
                "checkpoint not saved; training goes on, the one before it is intact",
                step=snapshot.step,
                rank=self._rank,
                reason=str(error),
            )
        finally:
            self._room.release()


def _when_written(written: Future[None], storage: Any, folder: str) -> Checkpoint:
    """On Ray's upload thread: the checkpoint to register, once it is there."""
    written.result()
    return Checkpoint(f"{storage.experiment_fs_path}/{folder}", storage.storage_filesystem)
