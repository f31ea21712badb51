"""Everything one checkpoint contains, as `checkpoints show` prints it: states, tensors, files.

In: a `Place`, one of its checkpoints, the keys if there are any. Out: `Inside`. Loads no torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ray_tracking.checkpoint.contents import TensorEntry, contents
from ray_tracking.checkpoint.keys import Keyring, WrongKeyError
from ray_tracking.checkpoint.manifest import SCHEMA, CheckpointInfo
from ray_tracking.monitoring.checkpoints import CheckpointLine
from ray_tracking.monitoring.places import Place

_NUMBER = re.compile(r"(?<![^.-])[0-9]+(?![^.])")


class StateView(NamedTuple):
    """One saved object. `ranks`: those that have one of their own; counts and `bytes` are None while it is hidden."""

    name: str
    ranks: tuple[int, ...]
    tensors: int | None
    items: int | None
    bytes: int | None
    shared: int | None


class FileView(NamedTuple):
    """A file as it is stored; `digest` is the xxh3-128 of that in hex."""

    name: str
    rank: int
    bytes: int
    raw_bytes: int
    digest: str


class Group(NamedTuple):
    """Tensors that differ only in the numbers in their names: `*` stands for those."""

    object: str
    name: str
    tensors: int
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, slots=True)
class Inside:
    """`hidden`: why tensors are not shown, None if they are."""

    line: CheckpointLine
    path: str
    save_id: str
    plan: str
    schema: int
    states: tuple[StateView, ...]
    files: tuple[FileView, ...]
    tensors: tuple[TensorEntry, ...]
    hidden: str | None

    def to_json(self) -> dict[str, Any]:
        facts = {key: getattr(self, key) for key in ("path", "save_id", "plan", "schema", "hidden")}
        rows = {key: [item._asdict() for item in getattr(self, key)] for key in ("states", "files", "tensors")}
        return {**asdict(self.line), **facts, **rows}


def inside(place: Place, info: CheckpointInfo, line: CheckpointLine, keyring: Keyring | None) -> Inside:
    """Raises CheckpointCorruptError that names the file which can't be read."""
    first = info.manifests[0]
    files = [
        FileView(name, manifest.rank, entry.size, entry.raw_size, entry.digest)
        for manifest in info.manifests
        for name, entry in sorted(manifest.files.items())
    ]
    tensors: tuple[TensorEntry, ...] = ()
    hidden = None
    try:
        found = contents(place.storage, info, keyring)
    except WrongKeyError as error:
        hidden = error.message
        own = {
            name: [m.rank for m in info.manifests if name in m.objects] for m in info.manifests for name in m.objects
        }
        states = [
            StateView(name, tuple(ranks) if len(ranks) > 1 else (), None, None, None, None)
            for name, ranks in sorted(own.items())
        ]
    else:
        tensors = tuple(sorted(found.tensors, key=lambda tensor: (tensor.object, tensor.rank, tensor.name)))
        states = []
        for each in found.objects:
            mine = [tensor for tensor in tensors if tensor.object == each.name]
            items, size = sum(tensor.items for tensor in mine), sum(tensor.bytes for tensor in mine)
            states.append(StateView(each.name, each.ranks, len({t.name for t in mine}), items, size, each.shared))
    return Inside(
        line, place.storage.path(info.folder), first.save_id, first.plan, SCHEMA, tuple(states), tuple(files), tensors,
        hidden,
    )  # fmt: skip


def groups(tensors: Sequence[TensorEntry]) -> list[Group]:
    """Like tensors together, in the order of the first of each."""
    gathered: dict[tuple[str, str, str, tuple[int, ...]], list[int]] = {}
    for tensor in tensors:
        name = _NUMBER.sub("*", tensor.name)
        gathered.setdefault((tensor.object, name, tensor.dtype, tensor.shape), []).append(tensor.bytes)
    return [
        Group(owner, name, len(sizes), dtype, shape, sum(sizes))
        for (owner, name, dtype, shape), sizes in gathered.items()
    ]
