"""What a checkpoint holds, without loading it: objects and tensors by name, dtype, shape and place. No torch.

In: a Storage, a `CheckpointInfo`, the keys if it is encrypted. Out: `Contents`. Of tensor files only headers are read
where they are not encrypted; state files are small and read and checked whole.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

from ray_tracking.checkpoint import manifest as names
from ray_tracking.checkpoint.keys import Keyring
from ray_tracking.checkpoint.manifest import CheckpointInfo, Manifest
from ray_tracking.checkpoint.sealing import Sealing
from ray_tracking.checkpoint.verified import open_verified, sealing_of
from ray_tracking.errors import CheckpointCorruptError
from ray_tracking.storage import Storage

_MOST_HEADER = 100 << 20
"""The limit of the safetensors library."""


class TensorEntry(NamedTuple):
    """A tensor as one rank stored it: whole, or its part of a sharded one. `dtype` as safetensors calls it."""

    object: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    rank: int
    file: str

    @property
    def items(self) -> int:
        return math.prod(self.shape)


class ObjectEntry(NamedTuple):
    """A state. `ranks`: those that have one of their own, empty if it is the same for all. `shared`: names of tensors
    that are another one of it."""

    name: str
    ranks: tuple[int, ...]
    shared: int


@dataclass(frozen=True, slots=True)
class Contents:
    """`tensors` are in the order of ranks and names."""

    objects: tuple[ObjectEntry, ...]
    tensors: tuple[TensorEntry, ...]


def contents(storage: Storage, info: CheckpointInfo, keyring: Keyring | None = None) -> Contents:
    """Raises WrongKeyError if it is encrypted and `keyring` does not open it, CheckpointCorruptError naming a file."""
    owners: dict[tuple[str, str], str] = {}
    ranks: dict[str, list[int]] = {}
    mentions: dict[str, list[tuple[str, str]]] = {}
    sealings = {manifest.rank: sealing_of(storage, info, manifest, keyring) for manifest in info.manifests}
    for manifest in info.manifests:
        for name, entry in _document(storage, info, manifest, sealings[manifest.rank])["objects"].items():
            ranks.setdefault(name, []).append(manifest.rank)
            found = [(entry["file"], tensor) for tensor in tensor_names(entry["tree"])]
            mentions.setdefault(name, []).extend(found)
            owners.update(dict.fromkeys(found, name))
    tensors = []
    for manifest in info.manifests:
        for stored in sorted(manifest.files):
            if not names.plain_name(stored).endswith(".safetensors"):
                continue
            family = stored.partition("-")[0].partition(".")[0]
            header = _header(storage, info, manifest, stored, sealings[manifest.rank])
            for tensor, (dtype, shape, size) in sorted(header.items()):
                owner = owners.get((family, tensor), family)
                tensors.append(TensorEntry(owner, tensor, dtype, shape, size, manifest.rank, stored))
    objects = tuple(
        # what is the same for all stands with rank 0 alone; so does a rank's own where there is only one rank
        ObjectEntry(name, tuple(own) if len(own) > 1 else (), len(mentions[name]) - len(set(mentions[name])))
        for name, own in sorted(ranks.items())
    )
    return Contents(objects, tuple(tensors))


def tensor_names(tree: Any) -> Iterator[str]:
    """Every tensor that a state's tree names, whole or sharded, as often as it does."""
    waiting = [tree]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting.extend(item)
        elif isinstance(item, dict):
            tag = item.get("$")
            if tag in ("tensor", "sharded"):
                yield item["name"]
            elif tag in ("bytes", "bytearray", "array") and "tensor" in item:
                yield item["tensor"]
            else:
                waiting.extend(item.values())


def _document(storage: Storage, info: CheckpointInfo, manifest: Manifest, sealing: Sealing) -> dict[str, Any]:
    stored = names.state_file(manifest.rank) + sealing.suffix
    if stored not in manifest.files:
        raise CheckpointCorruptError(f"{_path(storage, info, stored)} is not in the manifest of rank {manifest.rank}.")
    try:
        with open_verified(storage, info, manifest, stored, sealing) as memory:
            document: dict[str, Any] = json.loads(str(memory.view, "utf-8"))
        for entry in document["objects"].values():
            if not isinstance(entry["file"], str):
                raise TypeError("a state has no file")
            list(tensor_names(entry["tree"]))
        return document
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        path = _path(storage, info, stored)
        raise CheckpointCorruptError(f"{path} is not what a checkpoint holds: {error!r}.") from error


_Header = dict[str, tuple[str, tuple[int, ...], int]]
"""name -> (dtype, shape, bytes)"""


def _header(storage: Storage, info: CheckpointInfo, manifest: Manifest, stored: str, sealing: Sealing) -> _Header:
    try:
        if sealing.data_key is not None:
            with open_verified(storage, info, manifest, stored, sealing) as memory:
                length = int.from_bytes(memory.view[:8], "little")
                return _read_header(io.BytesIO(memory.view[: 8 + length]))
        with storage.open_input(names.join(info.folder, stored)) as file:
            return _read_header(_expanded(file) if sealing.compression else file)
    except FileNotFoundError as error:
        raise CheckpointCorruptError(f"{_path(storage, info, stored)} is not there any more.") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OSError) as error:
        raise CheckpointCorruptError(f"{_path(storage, info, stored)} is not a safetensors file: {error}.") from error


def _read_header(file: IO[bytes]) -> _Header:
    """The entries at the beginning of a file, without reading its tensors."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= _MOST_HEADER:
        raise ValueError(f"its header would have {length} bytes")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: (
            str(entry["dtype"]),
            tuple(map(int, entry["shape"])),
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }


def _expanded(file: Any) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(file, "zstd")


def _path(storage: Storage, info: CheckpointInfo, stored: str) -> str:
    return storage.path(names.join(info.folder, stored))
