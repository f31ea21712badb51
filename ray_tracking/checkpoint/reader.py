"""Reading a complete checkpoint: every file against its size and digest, then the states in it.

In: a Storage, a `CheckpointInfo`. Out: states by name, or the problems found. Torch is loaded only to
decode states.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ray_tracking.checkpoint import manifest as names
from ray_tracking.checkpoint.manifest import CheckpointInfo, Manifest, ManifestError
from ray_tracking.errors import CheckpointCorruptError
from ray_tracking.storage import Storage

if TYPE_CHECKING:
    import torch

_T = TypeVar("_T")


def read_objects(storage: Storage, info: CheckpointInfo, rank: int, *, only: str | None = None) -> dict[str, Any]:
    """The states that `rank` saved, by name (`only` that one, without reading the other tensors).

    Raises CheckpointCorruptError that names the file.
    """
    from ray_tracking.checkpoint.codec import decode_state

    manifest = info.manifests[rank]
    name = names.state_file(rank)
    trees = _parse(storage, info, name, json.loads, _read(storage, info, manifest, name))
    files: dict[str, dict[str, torch.Tensor]] = {}

    def decode(entry: dict[str, Any]) -> Any:
        file = entry["file"]
        if file not in files and file in manifest.files:
            files[file] = _tensors(storage, info, manifest, file)
        return decode_state(entry["tree"], files.get(file, {}))

    def decode_all(entries: dict[str, Any]) -> dict[str, Any]:
        return {key: decode(entry) for key, entry in entries.items() if only in (None, key)}

    return _parse(storage, info, name, decode_all, trees)


def problems(storage: Storage, info: CheckpointInfo) -> list[str]:
    """Read all bytes of all ranks: what is wrong, each naming its file."""
    found = []
    for manifest in info.manifests:
        own = names.join(info.folder, names.rank_file(manifest.rank, manifest.world_size))
        try:
            data = storage.read_bytes(own)
            names.decode_manifest(data)
            if data != names.encode_manifest(manifest):  # not the objects: NaN metrics differ from themselves
                found.append(f"{storage.path(own)} was replaced since it was listed.")
        except FileNotFoundError:
            found.append(f"{storage.path(own)} is not there any more.")
        except ManifestError as error:
            found.append(f"{storage.path(own)}: {error}.")
        for name in manifest.files:
            try:
                _read(storage, info, manifest, name)
            except CheckpointCorruptError as error:
                found.append(error.message)
    return found


def _tensors(storage: Storage, info: CheckpointInfo, manifest: Manifest, name: str) -> dict[str, torch.Tensor]:
    from ray_tracking.checkpoint.tensors import unpack

    return _parse(storage, info, name, unpack, _read(storage, info, manifest, name))


def _parse(storage: Storage, info: CheckpointInfo, name: str, parser: Callable[[Any], _T], data: Any) -> _T:
    try:
        return parser(data)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        path = storage.path(names.join(info.folder, name))
        raise CheckpointCorruptError(f"{path} is not what a checkpoint holds: {error}") from error


def _read(storage: Storage, info: CheckpointInfo, manifest: Manifest, name: str) -> bytes:
    path = names.join(info.folder, name)
    shown = storage.path(path)
    entry = manifest.files.get(name)
    if entry is None:
        raise CheckpointCorruptError(f"{shown} is not in the manifest of rank {manifest.rank}.")
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError as error:
        raise CheckpointCorruptError(f"{shown} is not there any more.") from error
    if len(data) != entry.size:
        raise CheckpointCorruptError(f"{shown} has {len(data)} bytes instead of {entry.size}: it was cut or replaced.")
    if names.digest(data) != entry.digest:
        raise CheckpointCorruptError(f"{shown} was altered since it was saved: its digest does not match.")
    return data
