"""Checkpoints of a run on Ray: asked of the strategy, copied on the training thread, written by another process.

Ray registers one report per look of its controller; a checkpoint is written at once, however slow that is.

In: the live objects of `run.restore`, steps, metrics. Out: checkpoint folders below the run, reported to Ray Train.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any

from ray_tracking.checkpoint import CheckpointStore, CheckpointStrategy
from ray_tracking.checkpoint.inplace import prepare_load
from ray_tracking.checkpoint.manifest import CheckpointInfo, Manifest, save_attempt, save_id, step_folder
from ray_tracking.checkpoint.nearby import Nearby
from ray_tracking.checkpoint.reader import OpenCheckpoint
from ray_tracking.checkpoint.staging import Stager
from ray_tracking.checkpoint.state import Description, describe
from ray_tracking.checkpoint.store import Found
from ray_tracking.checkpoint.writer import CheckpointWriter, WriterOptions
from ray_tracking.errors import CheckpointCorruptError, CheckpointError, RayTrackingError, RefusedError, StorageError
from ray_tracking.log import get_logger
from ray_tracking.runs.record import Attempt
from ray_tracking.runs.resuming import is_superseded
from ray_tracking.runtime.collective import all_true, broadcast, greatest

log = get_logger()

_LAST_SECONDS = 60.0
"""The longest that a training function's exception waits for its checkpoint."""
_OTHERS_SECONDS = 5.0
"""How long a rank waits for the other ranks' parts of that one, before Ray ends the group because of it."""
_UNUSABLE = (RefusedError, StorageError, FileNotFoundError)
"""What a checkpoint that can't be read on this rank raises."""
_READY, _NO_ROOM, _FAILED, _DIFFERENT = range(4)
"""What a rank says before a save; the greatest decides for all."""


class Saver:
    """Saves and restores one rank's share. Its methods are called by all ranks alike, on the training thread.

    `attempts`: the run's, so far; a checkpoint past what one of them resumed from belongs to a history that was left.
    `before_commit` runs before this rank's part can count: what it logged up to the checkpoint must be durable.
    `register` is told of each save, where training runs, as it is begun.
    `nearby`: the copies in this node's memory, which a restart on the same node reads instead of storage.
    """

    def __init__(
        self,
        store: CheckpointStore,
        strategy: CheckpointStrategy,
        options: WriterOptions,
        *,
        rank: int,
        world_size: int,
        attempt: int,
        attempts: Sequence[Attempt],
        before_commit: Callable[[], object],
        register: Callable[[Mapping[str, Any], str, Future[Manifest]], None],
        fail_on_error: bool = False,
        nearby: Nearby | None = None,
    ) -> None:
        self.strategy = strategy
        self.failed = 0
        """Checkpoints of this attempt that could not be written."""
        self.write_seconds = 0.0
        """What the last save that has ended took, from its beginning until it was on the storage."""
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._attempt = attempt
        self._before_commit = before_commit
        self._register = register
        self._fail_on_error = fail_on_error
        self._nearby = nearby
        self._writer = CheckpointWriter(store, strategy, options, nearby)
        self._written: deque[tuple[int, Future[Manifest]]] = deque()
        self._failure: str | None = None
        self._newest: str | None = None
        """The folder of the last save, relative to the store."""
        self._objects: dict[str, Any] = {}
        self._last_step: int | None = None
        self._last_time = time.monotonic()
        found: list[Found] = broadcast(store.scan() if rank == 0 else None)
        self._taken = {item.folder.rpartition("/")[2] for item in found}
        complete = [item.info for item in found if item.info is not None]
        self._candidates = [info for info in complete if not is_superseded(save_attempt(info), info.step, attempts)]
        best = strategy.best(self._candidates)
        self._best = None if best is None else best.metrics[strategy.monitor]

    @property
    def newest_step(self) -> int:
        """The step of the newest complete checkpoint when the attempt began, -1 if there was none."""
        return self._ordered()[0].step if self._candidates else -1

    def _ordered(self) -> list[CheckpointInfo]:
        return sorted(self._candidates, key=lambda info: info.order, reverse=True)

    def restore(self, objects: Mapping[str, Any]) -> CheckpointInfo | None:
        """Load the newest checkpoint that verifies on every rank into `objects`; they are what is saved from now on.

        None if the run has no checkpoint yet. Raises CheckpointCorruptError if it has some and none can be used,
        CheckpointError if one does not fit the objects.
        """
        self._objects = {name: value for name, value in objects.items() if value is not None}
        for info in self._ordered():
            copies = None if self._nearby is None else self._nearby.storage
            with OpenCheckpoint(self._store.storage, info, self._store.keyring, copies) as opened:
                load = self._prepared(opened)
                usable = all_true(load is not None)
                if usable and load is not None:
                    usable = all_true(self._loaded(load, info))
                    if usable and self._nearby is not None:
                        log.info("read from this node's memory", bytes=opened.from_nearby, of=info.size)
                del load  # it holds views of the files
            if not usable:
                continue
            self._last_step = info.step
            # Values that an earlier attempt reached past this step count no more: they are reached again.
            best = self.strategy.best([each for each in self._candidates if each.step <= info.step])
            self._best = None if best is None else best.metrics[self.strategy.monitor]
            if info.world_size != self._world_size:
                log.warning(
                    "resumed at another world size: the samples left in the epoch are dealt anew",
                    saved_with=info.world_size,
                    now=self._world_size,
                )
            return info
        if self._candidates:
            raise CheckpointCorruptError(
                f"None of the {len(self._candidates)} checkpoints of the run can be used; starting from the beginning "
                "would throw away what was trained.",
                hint="The log names what is wrong with each. Start a new run, or move the attempt folders away.",
            )
        return None

    def _prepared(self, opened: OpenCheckpoint) -> Callable[[], None] | None:
        """What restores the checkpoint on this rank; None (said) if it is known that it can't."""
        try:
            return prepare_load(self._objects, opened, rank=self._rank, world_size=self._world_size)
        except _UNUSABLE as error:
            log.error("checkpoint not usable, trying the one before it", step=opened.info.step, reason=str(error))
            return None

    def _loaded(self, load: Callable[[], None], info: CheckpointInfo) -> bool:
        """Whether the objects now hold the checkpoint. If not, which is said, they are for another one to overwrite."""
        try:
            load()
        except _UNUSABLE as error:
            log.error("checkpoint not usable, trying the one before it", step=info.step, reason=str(error))
            return False
        return True

    @property
    def has_objects(self) -> bool:
        return bool(self._objects)

    def prepare(self) -> None:
        """Provide memory for the copies, in the background: after the first step, when all states exist."""
        if self._objects:
            self._writer.prepare(Stager.size_of(self._describe(0, 0, {}, "")))

    def why_due(
        self,
        step: int,
        metric: Callable[[], float | None],
        *,
        epoch_end: bool = False,
        timed: bool = False,
        preempted: bool = False,
        ended: bool = False,
    ) -> str | None:
        """Ask the strategy: why a checkpoint is due, the same answer on every rank. None: it is not.

        `metric` gives the monitor's newest value on rank 0; it matters only with save_best_only. `timed`: rank 0's
        clock says that save_every_seconds have passed.
        """
        if not self._objects:
            return None

        def ask(value: float | None) -> str | None:
            return self.strategy.should_save(
                step,
                value,
                best_so_far=self._best,
                last_saved_step=self._last_step,
                seconds_since_last=self.strategy.save_every_seconds or 0.0 if timed else 0.0,
                epoch_end=epoch_end,
                preempted=preempted,
                ended=ended,
                resume_points=True,
            )

        reason = ask(None)
        if reason is None or not self.strategy.save_best_only:
            return reason
        best_or_not: str = broadcast(ask(metric()) if self._rank == 0 else None)
        return best_or_not

    def is_time(self) -> bool:
        """Whether save_every_seconds have passed since the last save, by this rank's clock."""
        seconds = self.strategy.save_every_seconds
        return seconds is not None and time.monotonic() - self._last_time >= seconds

    def save(self, step: int, epoch: int, metrics: Mapping[str, float], reason: str) -> bool:
        """Copy the state now; it is written, and the checkpoint registered with Ray Train, while training goes on.

        What happens while two copies are still being written is configured: wait, skip (False), or queue.
        Raises CheckpointError, on all ranks, if an earlier save failed and training is to fail with it.
        """
        if step == self._last_step:
            return False
        description = self._describe(step, epoch, metrics, reason)
        if not self._agree(step, description):
            return False
        folder = self._new_folder(step)
        staged = self._writer.stage(description)
        if description.manifest.improved:
            self._best = description.manifest.metrics[self.strategy.monitor]
        self._last_step, self._last_time = step, time.monotonic()
        self._newest = self._path(folder)
        written = self._writer.write(
            staged, self._newest, before_commit=self._before_commit, keep_house=self._rank == 0
        )
        written.add_done_callback(self._note_seconds(time.monotonic()))
        self._written.append((step, written))
        self._register({"step": step, "epoch": epoch, **metrics}, folder, written)
        return True

    def _note_seconds(self, begun: float) -> Callable[[Future[Manifest]], None]:
        def note(_: Future[Manifest]) -> None:
            self.write_seconds = time.monotonic() - begun

        return note

    def save_alone(self, step: int, epoch: int, metrics: Mapping[str, float], error: BaseException) -> None:
        """Save after an exception without a word to the other ranks, which may never come: complete if all of them do.

        Does not raise: the exception is what matters.
        """
        reason = self.strategy.should_save(
            step,
            metrics.get(self.strategy.monitor),
            best_so_far=self._best,
            last_saved_step=self._last_step,
            failed=True,
            resume_points=True,
        )
        if reason is None or not self.strategy.save_on_exception:
            return
        try:
            folder = self._path(self._new_folder(step))
            staged = self._writer.stage(self._describe(step, epoch, metrics, f"{reason}: {type(error).__name__}"))
            self._written.append((step, self._writer.write(staged, folder, before_commit=self._before_commit)))
            self._newest = folder
        except (RayTrackingError, OSError) as failure:
            log.warning("no checkpoint after the exception; the last one stands", reason=str(failure))

    def finish_writing(self) -> None:
        """Training has failed: give what is being written a minute, and the other ranks' parts of it some seconds.

        Ray ends their processes as soon as this one has ended. Does not raise.
        """
        wait([written for _, written in self._written], _LAST_SECONDS)
        end = time.monotonic() + _OTHERS_SECONDS
        try:
            while self._newest and self._store.inspect(self._newest).info is None and time.monotonic() < end:
                time.sleep(0.1)
        except (RayTrackingError, OSError) as error:
            log.warning("the last checkpoint can't be looked at", reason=str(error))

    def close(self) -> None:
        """Wait until everything is written. Raises CheckpointError if a save failed and the run is to fail with it."""
        self._settle(wait=True)
        self._writer.close()
        if self._failure is not None and self._fail_on_error:
            raise CheckpointError(self._failure)
        if self._nearby is not None:
            self._nearby.release()

    def _describe(self, step: int, epoch: int, metrics: Mapping[str, float], reason: str) -> Description:
        return describe(
            self._objects,
            step=step,
            epoch=epoch,
            metrics=metrics,
            rank=self._rank,
            world_size=self._world_size,
            save_id=save_id(self._attempt),
            reason=reason,
            improved=self.strategy.improves(metrics.get(self.strategy.monitor), self._best),
        )

    def _agree(self, step: int, description: Description) -> bool:
        """Whether all ranks save; False if one of them has no room and the save is to be skipped."""
        plan = broadcast(description.manifest.plan if self._rank == 0 else None)
        self._settle()
        state = _READY
        if description.manifest.plan != plan:
            state = _DIFFERENT
        elif self._failure is not None and self._fail_on_error:
            state = _FAILED
        elif self._writer.options.when_busy == "skip" and not self._writer.has_room():
            state = _NO_ROOM
        worst = greatest(state)
        if worst == _NO_ROOM:
            log.warning("checkpoint skipped: the ones before it are still being written", step=step)
            return False
        if worst == _FAILED:
            raise CheckpointError(
                self._failure or "A checkpoint could not be saved on another rank; its log says why.",
                hint="Make room or fix the storage, then resume. on_write_failure: continue would train on.",
            )
        if worst == _DIFFERENT:
            raise CheckpointError(
                "The ranks hold states of different structure, so no checkpoint of them can be complete.",
                hint="Build model, optimizer and everything given to run.restore alike on every rank.",
            )
        return True

    def _new_folder(self, step: int) -> str:
        """A name that no earlier try has used, the same on every rank."""
        trial = 1
        while step_folder(step, trial) in self._taken:
            trial += 1
        self._taken.add(step_folder(step, trial))
        return step_folder(step, trial)

    def _path(self, folder: str) -> str:
        return f"{self._store.folder}/{folder}" if self._store.folder else folder

    def _settle(self, *, wait: bool = False) -> None:
        """Take note of the saves that have ended (`wait`: of all). A failure is said and counted."""
        while self._written and (wait or self._written[0][1].done()):
            step, written = self._written.popleft()
            error = written.exception()
            if error is None:
                continue
            self.failed += 1
            self._failure = f"The checkpoint of step {step} could not be saved: {error}"
            log.error(
                "checkpoint not saved; training goes on, the one before it is intact",
                step=step,
                rank=self._rank,
                reason=str(error),
            )
