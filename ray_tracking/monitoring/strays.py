"""What lies among checkpoints and is none: half-written, emptied, truncated, renamed, foreign; and which of it may go.

In: a `Place`. Out: `Stray`s, each with what it is, why it does not count, and why it is left alone or not.
What may go is decided by pure functions; only `collect` deletes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from ray_tracking.checkpoint import manifest as names
from ray_tracking.checkpoint.manifest import Manifest, ManifestError
from ray_tracking.checkpoint.store import CheckpointStore, Found
from ray_tracking.errors import NameRefusedError, RayTrackingError, StorageError
from ray_tracking.monitoring.places import Activity, Place
from ray_tracking.storage import Entry, Storage
from ray_tracking.writing import TEMPORARY

UNDER_WAY_SECONDS = 24 * 3600.0
"""Where nobody says whether the writer lives, what was touched within this time may belong to a save under way.
Long, because the writer's clock and ours may differ, and a file on S3 is touched only when it is whole."""

_OWN_FILE = re.compile(r"(?:model|state)(?:-[0-9]+)?(?:-of-[0-9]+)?\.(?:safetensors|json)")
_CHECKPOINT_ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pkl", ".distcp", ".zst", ".enc")


_NOT_OURS = "another program's checkpoint, or put there by hand"


class Kind(StrEnum):
    """What a stray is."""

    HALF_WRITTEN = "half-written"
    EMPTIED = "emptied"
    TRUNCATED = "truncated"
    DAMAGED = "damaged"
    RENAMED = "renamed"
    FOREIGN = "foreign"
    OTHER_VERSION = "other version"
    UNFINISHED_FILE = "unfinished file"


ONCE_COMPLETE = frozenset({Kind.TRUNCATED, Kind.DAMAGED})
"""The kinds that were checkpoints: no save under way looks like this, since a manifest comes last and whole."""


_NEVER = {
    Kind.FOREIGN: "not written by ray-tracking: move or delete it yourself",
    Kind.RENAMED: "whole, under another name: rename it back or delete it yourself",
    Kind.OTHER_VERSION: "another version of ray-tracking may read it",
}
RECENT = "recent: a save may be under way"
"""Why something is left alone that would go if a person said that nothing is writing there."""


@dataclass(frozen=True, slots=True)
class Stray:
    """One folder (or unfinished file) that does not count. `path` is relative to the place; `kept`: why `gc` leaves it
    alone, None if it may go."""

    path: str
    kind: Kind
    why: str
    bytes: int
    attempt: int = 0
    step: int | None = None
    modified: float = 0.0
    pinned: bool = False
    kept: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "complete": False, "kind": self.kind.value, "delete": self.kept is None}

    def place_in(self, place: Place) -> str:
        """Its whole path. Names that people gave are none that a Storage would join."""
        return f"{place.storage.path().rstrip('/')}/{self.path}"


@dataclass(frozen=True, slots=True)
class Newest:
    """The newest complete checkpoint of a place, and when its last file was written."""

    attempt: int = -1
    step: int = -1
    modified: float = 0.0


def strays(place: Place, found: Sequence[Found], now: float) -> list[Stray]:
    """Everything at the place that is no complete checkpoint, by attempt, step and name; `found`: the store's scan."""
    folders = [_folder_stray(place, item) for item in found if item.info is None]
    folders += _other_folders(place)
    every = _with_unfinished(folders, _unfinished_files(place))
    newest = _newest(place, found)
    judged = [replace(stray, kept=why_kept(stray, place, newest, now)) for stray in every]
    return sorted(judged, key=lambda stray: (stray.attempt, -1 if stray.step is None else stray.step, stray.path))


def why_kept(stray: Stray, place: Place, newest: Newest, now: float) -> str | None:
    """Why `gc` leaves it alone, None if it may go. Pure."""
    if stray.pinned:
        return "pinned: delete the file `pinned` in it to let it go"
    if stray.kind in _NEVER:
        return _NEVER[stray.kind]
    if place.activity is Activity.ENDED:
        return None
    if place.activity is Activity.RUNNING:
        # the files of the run itself lie outside its attempts' folders
        current = stray.attempt in (0, place.newest_attempt)
        return "the run is alive: a save may be under way" if current else None
    if stray.kind in ONCE_COMPLETE:
        return None
    # A script that was started over saves small steps again: the time tells what the step does not.
    step = -1 if stray.step is None else stray.step
    younger = stray.modified >= newest.modified or (stray.attempt, step) > (newest.attempt, newest.step)
    if younger and now - stray.modified < UNDER_WAY_SECONDS:
        return RECENT
    return None


def assume_idle(place: Place) -> Place:
    """The place as it is judged when a person says that nothing writes there; a run that lives is not believed dead."""
    return replace(place, activity=Activity.ENDED) if place.activity is Activity.UNKNOWN else place


def collect(place: Place, doomed: Iterable[Stray]) -> list[tuple[Stray, str]]:
    """Delete them; those that could not be deleted, with the reason. Each is looked at once more before it goes."""
    failed = []
    store = place.store
    for stray in doomed:
        try:
            if stray.kind is Kind.UNFINISHED_FILE:
                _delete_file(place, stray)
            elif not _counts_now(store, stray.path):
                store.delete(stray.path)
        except RayTrackingError as error:
            failed.append((stray, error.message))
    return failed


def _counts_now(store: CheckpointStore, folder: str) -> bool:
    """Whether a save has been finished, or a person has pinned it, since it was listed."""
    return store.inspect(folder).info is not None or store.storage.exists(names.join(folder, names.PIN_FILE))


def _delete_file(place: Place, stray: Stray) -> None:
    path = stray.place_in(place)
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"Can't delete {path!r}: {error}") from error


def _newest(place: Place, found: Iterable[Found]) -> Newest:
    infos = [item.info for item in found if item.info is not None]
    if not infos:
        return Newest()
    info = max(infos, key=lambda item: item.order)
    return Newest(info.attempt, info.step, _modified(place, info.folder, place.storage.list(info.folder)))


# -- what each one is --------------------------------------------------------------------------------


def _folder_stray(place: Place, item: Found) -> Stray:
    """A folder with a checkpoint's name that holds none."""
    entries = place.storage.list(item.folder)
    sizes = {entry.name: entry.size for entry in entries if not entry.is_dir}
    read = {name: _read_manifest(place, names.join(item.folder, name)) for name in sizes if names.parse_rank_file(name)}
    odd = [entry.name for entry in entries if entry.is_dir or not _is_own(entry.name)]
    kind, why = classify(item.step, sizes, read, odd, item.reason)
    return Stray(
        path=item.folder,
        kind=kind,
        why=why,
        bytes=sum(sizes.values()),
        attempt=item.attempt,
        step=item.step,
        modified=_modified(place, item.folder, entries),
        pinned=names.PIN_FILE in sizes,
    )


def classify(
    step: int, sizes: Mapping[str, int], read: Mapping[str, Manifest | Kind], odd: Sequence[str], reason: str
) -> tuple[Kind, str]:
    """What a step's folder is that holds no complete checkpoint, and why it is none. Pure.

    `sizes`: every file in it; `read`: each manifest, or what is wrong with it (DAMAGED, OTHER_VERSION);
    `odd`: what no checkpoint has; `reason`: the store's.
    """
    data = [size for name, size in sizes.items() if name != names.PIN_FILE]
    if odd:
        return Kind.FOREIGN, f"it holds what no checkpoint has: {', '.join(odd[:3])}"
    if not any(data):
        return Kind.EMPTIED, "all its files are empty" if data else "it is empty"
    if Kind.OTHER_VERSION in read.values():
        return Kind.OTHER_VERSION, reason
    if Kind.DAMAGED in read.values():
        return Kind.DAMAGED, reason
    whole = {place: item for name, item in read.items() if (place := names.parse_rank_file(name)) is not None}
    manifests = {place: item for place, item in whole.items() if isinstance(item, Manifest)}
    steps = {item.step for item in manifests.values()}
    if len(steps) == 1 and step not in steps:
        other = steps.pop()
        if names.why_incomplete(other, sizes, manifests) is None:
            return Kind.RENAMED, f"it is the checkpoint of step {other} under another name"
    worlds = {world for _, world in manifests}
    saves = {(item.save_id, item.plan) for item in manifests.values()}
    if len(worlds) != 1 or len(manifests) < worlds.pop() or len(saves) > 1:
        return Kind.HALF_WRITTEN, reason
    cut = any(sizes.get(name) != entry.size for item in manifests.values() for name, entry in item.files.items())
    return (Kind.TRUNCATED if cut else Kind.DAMAGED), reason


def _is_own(name: str) -> bool:
    """Whether a file in a checkpoint's folder is ours by its name."""
    return (
        name == names.PIN_FILE
        or names.parse_rank_file(name) is not None
        or _OWN_FILE.fullmatch(names.plain_name(name)) is not None
    )


def _read_manifest(place: Place, path: str) -> Manifest | Kind:
    try:
        data = place.storage.read_bytes(path)
    except FileNotFoundError:
        return Kind.DAMAGED
    try:
        return names.decode_manifest(data)
    except ManifestError:
        return Kind.OTHER_VERSION if _of_other_version(data) else Kind.DAMAGED


def _of_other_version(data: bytes) -> bool:
    """Whether it is a manifest of another schema: then its digest may be computed by rules we don't know."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(body, dict) and isinstance(body.get("schema"), int) and body["schema"] != names.SCHEMA


def _other_folders(place: Place) -> Iterator[Stray]:
    """Folders without a checkpoint's name that hold what looks like one."""
    roots = [("", 0)]
    for entry in place.storage.list():
        attempt = names.parse_attempt_folder(entry.name) if entry.is_dir else None
        if attempt is not None:
            roots.append((entry.name, attempt))
    for root, attempt in roots:
        for entry in place.storage.list(root):
            path = names.join(root, entry.name)
            if entry.is_dir and not (names.parse_step_folder(entry.name) or names.parse_attempt_folder(entry.name)):
                stray = _other_folder(place, path, attempt)
                if stray is not None:
                    yield stray
            elif not entry.is_dir and entry.name.endswith(_CHECKPOINT_ENDINGS):
                yield Stray(path, Kind.FOREIGN, _NOT_OURS, entry.size, attempt, modified=entry.modified)


def _other_folder(place: Place, path: str, attempt: int) -> Stray | None:
    try:
        # people name folders as they like: ours can't be reached by such names, local ones can
        storage = (
            Storage.open(f"{place.storage.path()}/{path}") if place.storage.is_local else place.storage.child(path)
        )
    except NameRefusedError:
        return None
    files = {entry.name: entry for entry in storage.list() if not entry.is_dir}
    size = sum(entry.size for entry in files.values())
    modified = max((entry.modified for entry in files.values()), default=0.0)
    if any(names.parse_rank_file(name) for name in files):
        why = "its name is not that of a checkpoint (step-000120)"
        return Stray(path, Kind.RENAMED, why, size, attempt, modified=modified)
    if any(name.endswith(_CHECKPOINT_ENDINGS) for name in files):
        return Stray(path, Kind.FOREIGN, _NOT_OURS, size, attempt, modified=modified)
    return None


def _unfinished_files(place: Place) -> Iterator[Stray]:
    """What a killed process left of a local file it was writing; object stores show only whole objects."""
    if not place.storage.is_local:
        return
    root = place.storage.path()
    for folder, _, files in os.walk(root):
        for file in files:
            if not file.startswith(TEMPORARY):
                continue
            path = os.path.join(folder, file)
            try:
                status = os.stat(path)
            except FileNotFoundError:
                continue
            relative = os.path.relpath(path, root).replace(os.sep, "/")
            attempt = names.parse_attempt_folder(relative.partition("/")[0]) or 0
            why = "a file whose writing was cut off"
            yield Stray(relative, Kind.UNFINISHED_FILE, why, status.st_size, attempt, modified=status.st_mtime)


def _with_unfinished(folders: Sequence[Stray], files: Iterable[Stray]) -> list[Stray]:
    """Both together; an unfinished file in a folder that is listed itself goes with that."""
    every = {stray.path: stray for stray in folders}
    for file in files:
        folder = every.get(file.path.rpartition("/")[0])
        if folder is None:
            every[file.path] = file
        else:
            size, modified = folder.bytes + file.bytes, max(folder.modified, file.modified)
            every[folder.path] = replace(folder, bytes=size, modified=modified)
    return list(every.values())


def _modified(place: Place, folder: str, entries: Sequence[Entry]) -> float:
    """Unix time of the last change in a folder; for an empty one that of the folder itself, 0 where there is none."""
    if entries or not place.storage.is_local:
        return max((entry.modified for entry in entries), default=0.0)
    try:
        return os.stat(place.storage.path(folder)).st_mtime
    except OSError:
        return 0.0
