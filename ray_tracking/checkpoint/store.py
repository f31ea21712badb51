"""Checkpoints on storage: the one definition of which are there, and their writing, loading and deleting.

In: a Storage, snapshots. Out: `CheckpointInfo`, `TrainingCheckpoint`. Torch is loaded only by writing and
loading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ray_tracking.checkpoint import manifest as names
from ray_tracking.checkpoint import reader
from ray_tracking.checkpoint.loaded import ModelCheckpoint, TrainingCheckpoint
from ray_tracking.checkpoint.manifest import CheckpointInfo, Manifest, ManifestError, OtherVersionError
from ray_tracking.errors import CheckpointCorruptError, CheckpointError
from ray_tracking.log import get_logger
from ray_tracking.storage import Entry, Storage

if TYPE_CHECKING:
    from ray_tracking.checkpoint.keys import Keyring
    from ray_tracking.checkpoint.sealing import Sealing
    from ray_tracking.checkpoint.state import Snapshot

_READERS = 16
"""Looks at remote checkpoints at a time."""
_T = TypeVar("_T")
_log = get_logger()


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint folder on storage: `info` if it is complete, else `reason` why it does not count."""

    folder: str
    attempt: int
    step: int
    info: CheckpointInfo | None
    reason: str = ""
    other_version: bool = False
    """Another version of this package wrote it: it may be complete."""


class CheckpointStore:
    """The checkpoints below one directory: directly in it and in its attempt folders.

    `folder` is where new ones go: "" or an attempt folder such as `attempt-003`. Thread-safe but for one
    writer per rank.
    """

    def __init__(self, storage: Storage, folder: str = "", *, keyring: Keyring | None = None) -> None:
        if folder and names.parse_attempt_folder(folder) is None:
            raise CheckpointError(
                f"Checkpoints can't go into the folder {folder!r}.", hint="Use attempt-001 and so on."
            )
        self.storage = storage
        self.folder = folder
        self.keyring = keyring
        """The keys of encrypted checkpoints, for loading."""
        self._manifests: dict[tuple[str, int, float], Manifest] = {}

    # -- what is there -----------------------------------------------------------------------------

    def scan(self) -> list[Found]:
        """Every checkpoint folder, complete or not, by attempt, then step."""
        roots = [("", 0)]
        for entry in self.storage.list():
            attempt = names.parse_attempt_folder(entry.name) if entry.is_dir else None
            if attempt is not None:
                roots.append((entry.name, attempt))
        places = []
        for root, attempt in roots:
            for entry in self.storage.list(root):
                parsed = names.parse_step_folder(entry.name) if entry.is_dir else None
                if parsed is not None:
                    places.append((names.join(root, entry.name), attempt, parsed[0]))
        if self.storage.is_local or len(places) < 2:
            found = [self._inspect(*place) for place in places]
        else:  # each costs two round trips
            with ThreadPoolExecutor(_READERS) as readers:
                found = list(readers.map(lambda place: self._inspect(*place), places))
        return sorted(found, key=lambda item: (item.attempt, item.step, item.folder))

    def checkpoints(self) -> list[CheckpointInfo]:
        """The complete checkpoints, oldest first; of several at one step only the newest."""
        return newest_per_step(item.info for item in self.scan() if item.info is not None)

    def find(self, step: int) -> CheckpointInfo | None:
        """The complete checkpoint of a step."""
        return next((info for info in self.checkpoints() if info.step == step), None)

    def inspect(self, folder: str) -> Found:
        """One checkpoint folder, given relative to the store."""
        root, _, name = folder.rpartition("/")
        parsed = names.parse_step_folder(name)
        if parsed is None:
            return Found(folder, 0, -1, None, "its name is not that of a checkpoint (step-000120)")
        return self._inspect(folder, names.parse_attempt_folder(root) or 0, parsed[0])

    def _inspect(self, folder: str, attempt: int, step: int) -> Found:
        entries = {entry.name: entry for entry in self.storage.list(folder) if not entry.is_dir}
        manifests = {}
        for name, entry in entries.items():
            place = names.parse_rank_file(name)
            if place is None:
                continue
            try:
                manifests[place] = self._manifest(folder, entry)
            except FileNotFoundError:
                continue  # deleted since the listing
            except ManifestError as error:
                other = isinstance(error, OtherVersionError)
                return Found(folder, attempt, step, None, f"{name}: {error}", other_version=other)
        reason = names.why_incomplete(step, {name: entry.size for name, entry in entries.items()}, manifests)
        if reason is not None:
            return Found(folder, attempt, step, None, reason)
        ordered = tuple(manifests[place] for place in sorted(manifests))
        return Found(folder, attempt, step, names.combine(folder, attempt, ordered, pinned=names.PIN_FILE in entries))

    def _manifest(self, folder: str, entry: Entry) -> Manifest:
        path = names.join(folder, entry.name)
        key = (path, entry.size, entry.modified)
        if key not in self._manifests:
            self._manifests[key] = names.decode_manifest(self.storage.read_bytes(path))
        return self._manifests[key]

    # -- writing -----------------------------------------------------------------------------------

    def folder_of(self, step: int) -> str:
        """Where all ranks of one attempt write the checkpoint of `step` without having to agree on it."""
        return names.join(self.folder, names.step_folder(step))

    def new_folder(self, step: int) -> str:
        """A folder for `step` that nothing was ever written to, so that two tries can't mix."""
        trial = 1
        while self.storage.exists(folder := names.join(self.folder, names.step_folder(step, trial))):
            trial += 1
        return folder

    def clear(self, folder: str, rank: int, world_size: int) -> None:
        """Make what this rank left in `folder` in an earlier try invisible, before it writes there again.

        A complete checkpoint is never written over: CheckpointError.
        """
        own = names.rank_file(rank, world_size)
        if not any(entry.name == own for entry in self.storage.list(folder)):
            return
        if self.inspect(folder).info is not None:
            raise CheckpointError(
                f"{self.storage.path(folder)} already holds a complete checkpoint; it is not written over.",
                hint="Save a later step, or take the folder from new_folder(step).",
            )
        self.storage.delete(names.join(folder, own))

    def write_snapshot(self, folder: str, snapshot: Snapshot, sealing: Sealing | None = None) -> Manifest:
        """Write one rank's part into `folder`, its manifest last; from any thread. Durable when it returns."""
        from ray_tracking.checkpoint.part import PartWriter
        from ray_tracking.checkpoint.sealing import Sealing

        self.clear(folder, snapshot.manifest.rank, snapshot.manifest.world_size)
        part = PartWriter(self.storage, folder, sealing or Sealing())
        writing = part.write(snapshot.manifest, snapshot.files)
        while True:
            try:
                next(writing)
            except StopIteration as end:
                manifest: Manifest = end.value
                part.commit(manifest)
                return manifest

    # -- loading -----------------------------------------------------------------------------------

    def load(self, info: CheckpointInfo, *, rank: int = 0, world_size: int | None = None) -> TrainingCheckpoint:
        """Load what `rank` of `world_size` (that of the save, if None) needs; every file it reads is checked.

        At another world size rank-specific objects are rank 0's; random states are those of the same rank,
        if it was there.
        Raises CheckpointCorruptError that names the file.
        """
        from ray_tracking.checkpoint.state import RNG

        source = rank if rank < info.world_size and world_size in (None, info.world_size) else 0
        with reader.OpenCheckpoint(self.storage, info, self.keyring) as opened:
            objects = opened.states(source)
            rng = objects.pop(RNG, None)
            if rank != source:
                has = rank < info.world_size and RNG in opened.names(rank)
                rng = opened.state(RNG, rank) if has else None
        return TrainingCheckpoint(
            model_state=objects.get("model"),
            epoch=info.epoch,
            step=info.step,
            metrics=dict(info.metrics),
            path=self.storage.path(info.folder),
            optimizer_state=objects.get("optimizer"),
            scheduler_state=objects.get("scheduler"),
            objects=objects,
            rng=rng,
            rank=rank if rank < info.world_size else 0,
            world_size=info.world_size,
        )

    def load_model(self, info: CheckpointInfo) -> ModelCheckpoint:
        """Only the weights; CheckpointError if the checkpoint has none."""
        objects = reader.read_objects(self.storage, info, 0, only="model", keyring=self.keyring)
        path = self.storage.path(info.folder)
        if "model" not in objects:
            raise CheckpointError(f"The checkpoint {path} holds no model.")
        return ModelCheckpoint(objects["model"], info.epoch, info.step, dict(info.metrics), path)

    def load_latest(self, *, rank: int = 0, world_size: int | None = None) -> TrainingCheckpoint | None:
        """The newest that loads; each newer one that does not is named in a warning. None if there is none.

        Raises CheckpointCorruptError if there are checkpoints but all are damaged: that is no fresh start.
        """
        return self.load_first(self._newest_first(), rank=rank, world_size=world_size)

    def latest_valid(self) -> CheckpointInfo | None:
        """Like `load_latest`, but reads and checks every file of every rank and loads none: what rank 0
        broadcasts.
        """
        return self._first(self._newest_first(), self._checked)

    def load_first(
        self, candidates: Iterable[CheckpointInfo], *, rank: int = 0, world_size: int | None = None
    ) -> TrainingCheckpoint | None:
        """The first of `candidates` that loads, with a warning for each one passed over. Raises like
        `load_latest`.
        """
        return self._first(candidates, lambda info: self.load(info, rank=rank, world_size=world_size))

    def verify(self, info: CheckpointInfo) -> list[str]:
        """Read everything and compare digests: the problems found, each naming its file; empty if it is
        what was saved.
        """
        return reader.problems(self.storage, info, self.keyring)

    def _checked(self, info: CheckpointInfo) -> CheckpointInfo:
        problems = self.verify(info)
        if problems:
            raise CheckpointCorruptError("; ".join(problems))
        return info

    def _newest_first(self) -> Iterable[CheckpointInfo]:
        found = self.scan()
        complete = newest_per_step((item.info for item in found if item.info is not None), keep_all=True)
        newest = (complete[-1].attempt, complete[-1].step) if complete else (-1, -1)
        for item in found:
            if item.info is None and (item.attempt, item.step) > newest:
                _log.warning("incomplete checkpoint skipped", folder=item.folder, reason=item.reason)
        return reversed(complete)

    def _first(self, candidates: Iterable[CheckpointInfo], use: Callable[[CheckpointInfo], _T]) -> _T | None:
        damaged = []
        for info in candidates:
            try:
                return use(info)
            except CheckpointCorruptError as error:
                _log.warning("checkpoint skipped, the one before it is tried", folder=info.folder, reason=error.message)
                damaged.append(error.message)
        if damaged:
            raise CheckpointCorruptError(
                f"All {len(damaged)} checkpoints below {self.storage.uri} are damaged. The newest: {damaged[0]}",
                hint="Bring back the files from a copy, or use another directory to start afresh.",
            )
        return None

    # -- keeping and deleting ----------------------------------------------------------------------

    def pin(self, info: CheckpointInfo) -> None:
        """Keep it from retention until `unpin`."""
        self.storage.write_bytes(names.join(info.folder, names.PIN_FILE), b"pinned\n")

    def unpin(self, info: CheckpointInfo) -> None:
        self.storage.delete(names.join(info.folder, names.PIN_FILE))

    def delete(self, folder: str) -> None:
        """Delete a checkpoint folder: manifests first, so that one half deleted is no checkpoint any more."""
        for entry in self.storage.list(folder):
            if not entry.is_dir and names.parse_rank_file(entry.name) is not None:
                self.storage.delete(names.join(folder, entry.name))
        self.storage.delete_dir(folder)


def newest_per_step(infos: Iterable[CheckpointInfo], *, keep_all: bool = False) -> list[CheckpointInfo]:
    """Oldest first; of several checkpoints at one step the newest, unless `keep_all`."""
    ordered = sorted(infos, key=lambda info: info.order)
    if keep_all:
        return ordered
    return sorted({info.step: info for info in ordered}.values(), key=lambda info: info.order)
