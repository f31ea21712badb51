"""Reading a complete checkpoint: states, tensors or parts of them, from files that are verified before their first use.

In: a Storage, a `CheckpointInfo`, the keys of encrypted ones. Out: states by name. Torch is loaded only by states and
tensors.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ray_tracking.checkpoint import manifest as names
from ray_tracking.checkpoint.keys import Keyring
from ray_tracking.checkpoint.manifest import CheckpointInfo
from ray_tracking.checkpoint.tensor_views import TensorFile, private_copies
from ray_tracking.checkpoint.verified import CheckpointFiles, open_verified, problems, sealing_of
from ray_tracking.errors import CheckpointCorruptError
from ray_tracking.storage import Storage

if TYPE_CHECKING:
    import torch

__all__ = ["Local", "OpenCheckpoint", "open_verified", "problems", "read_objects", "sealing_of"]

Local = Callable[[str, tuple[int, ...], "torch.dtype"], "torch.Tensor"]
"""(name, whole shape, dtype) of a sharded tensor -> the tensor to stand for it in a state."""
_FAMILIES = ("model", "state")
_DAMAGE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    RuntimeError,
    OverflowError,
    RecursionError,
    struct.error,
)
"""What decoding raises when JSON or bytes are not what a checkpoint holds."""


class OpenCheckpoint:
    """A checkpoint that is being read. Each file is read and checked at its first use, and let go by `close`.

    For one thread. Everything here raises CheckpointCorruptError that names the file that is not what was saved,
    WrongKeyError where the keys do not open it, StorageError where storage can't be read.
    """

    def __init__(self, storage: Storage, info: CheckpointInfo, keyring: Keyring | None = None) -> None:
        self.info = info
        self.path = storage.path(info.folder)
        self._files = CheckpointFiles(storage, info, keyring)
        self._documents: dict[int, dict[str, Any]] = {}
        self._tensors: dict[tuple[int, str], TensorFile | None] = {}

    def close(self, *, discard: bool = False) -> None:
        """Let the files go. Views that are still used stay valid (see `FileMemory.close`)."""
        self._tensors.clear()
        self._files.close(discard=discard)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(discard=kind is not None)

    def names(self, rank: int = 0) -> tuple[str, ...]:
        """The objects that `rank` can have: those of all ranks and its own."""
        return tuple(sorted({*self.saved_by(0), *self.saved_by(rank)}))

    def saved_by(self, rank: int) -> tuple[str, ...]:
        """The objects in the rank's own file: of rank 0 those of all ranks too."""
        return tuple(self._document(rank)["objects"])

    def state(self, name: str, rank: int = 0, *, copy: bool = True, local: Local | None = None) -> Any:
        """The state of an object: the one that `rank` itself saved, else that of all ranks. KeyError without it.

        Without `copy` its tensors are views of the files: not to be kept after `close`.
        `local` gives what stands for a sharded tensor; otherwise that is the whole tensor.
        """
        from ray_tracking.checkpoint.codec import decode_state

        self.prefetch([name], rank)
        where, family, tree = self._tree(name, rank)
        with self._reading(where):
            given = {one: self._find(family, one, rank) for sharded, one in _tensor_names(tree) if not sharded}
            if copy:
                given = dict(zip(given, private_copies(given.values()), strict=True))
            return decode_state(tree, _Tensors(self, family, rank, given, local, copy))

    def states(self, rank: int = 0, *, copy: bool = True, local: Local | None = None) -> dict[str, Any]:
        """All of `names(rank)`. Files are checked on several threads."""
        self.prefetch(self.names(rank), rank)
        return {name: self.state(name, rank, copy=copy, local=local) for name in self.names(rank)}

    def prefetch(self, objects: Iterable[str], rank: int = 0) -> None:
        """Read and check now, on several threads, all files that the states of `objects` lie in."""
        needs: dict[tuple[int, str], None] = {}
        for name in objects:
            where, family, tree = self._tree(name, rank)
            with self._reading(where):
                needs.update(dict.fromkeys(self._needs(where, family, tree)))
        missing = [place for place in needs if place not in self._tensors]
        self._files.open_all([(each, self._plain(family, each)) for each, family in missing])
        for each, family in missing:
            self._tensor_file(family, each)

    def tensor(self, family: str, name: str, rank: int = 0) -> torch.Tensor:
        """A view of a tensor that is stored whole, in whichever rank's file of the family it lies (`rank`'s first)."""
        with self._reading(0):
            return self._find(family, name, rank)

    def region(
        self, family: str, name: str, offset: tuple[int, ...], size: tuple[int, ...], rank: int = 0
    ) -> torch.Tensor:
        """Any part of a tensor, put together from the parts that the ranks stored; only files that have some are read.

        A view where one file has all of it (`rank`'s is asked first), else memory of its own.
        """
        from ray_tracking.checkpoint import regions

        with self._reading(0):
            pieces = {each: self._document(each)["pieces"] for each in self._order(rank)}
            places = {each: tuple(known[name]) for each, known in pieces.items() if name in known}
            if not places:
                return regions.cut(self._find(family, name, rank), offset, size)
            return regions.assemble(places, lambda each: self._piece(family, name, each), offset, size)

    # -- trees -------------------------------------------------------------------------------------

    def _document(self, rank: int) -> dict[str, Any]:
        if rank not in self._documents:
            plain = names.state_file(rank)
            memory = self._files.open(rank, plain)
            if memory is None:
                raise CheckpointCorruptError(f"{self._files.path(rank, plain)} is not in the manifest of rank {rank}.")
            try:
                with self._reading(rank):
                    self._documents[rank] = _read_document(memory.view)
            finally:
                self._files.drop(rank, plain)
        return self._documents[rank]

    def _tree(self, name: str, rank: int) -> tuple[int, str, Any]:
        """(rank whose document has it, family of its tensors, tree) of an object."""
        own = self._document(rank)["objects"]
        where = rank if name in own else 0
        entry = self._document(where)["objects"][name]
        with self._reading(where):
            if entry["file"] not in _FAMILIES:
                raise ValueError(f"{name!r} has its tensors in {entry['file']!r}")
            return where, entry["file"], entry["tree"]

    @contextmanager
    def _reading(self, rank: int) -> Iterator[None]:
        """What fails in here fails because of what the state file of `rank` says."""
        try:
            yield
        except _DAMAGE as error:
            path = self._files.path(rank, names.state_file(rank))
            raise CheckpointCorruptError(f"{path} is not what a checkpoint holds: {_reason(error)}.") from error

    # -- tensors -----------------------------------------------------------------------------------

    def _needs(self, where: int, family: str, tree: Any) -> list[tuple[int, str]]:
        """The files to read for a tree: all ranks', unless it is one rank's own. Of a sharded one none: a rank wants
        few of them, and which shows later.
        """
        kinds = {sharded for sharded, _ in _tensor_names(tree)}
        if True in kinds or not kinds:
            return []
        return [(rank, family) for rank in ((where,) if where else range(self.info.world_size))]

    def _plain(self, family: str, rank: int) -> str:
        return names.model_file(rank, self.info.world_size) if family == "model" else names.tensor_file(rank)

    def _tensor_file(self, family: str, rank: int) -> TensorFile | None:
        """None if the rank stored no tensor of the family."""
        if (rank, family) not in self._tensors:
            plain = self._plain(family, rank)
            memory = self._files.open(rank, plain)
            try:
                self._tensors[rank, family] = None if memory is None else TensorFile(memory.view)
            except ValueError as error:
                raise CheckpointCorruptError(f"{self._files.path(rank, plain)} is {error}.") from error
        return self._tensors[rank, family]

    def _find(self, family: str, name: str, rank: int) -> torch.Tensor:
        for each in self._order(rank):
            file = self._tensor_file(family, each)
            if file is not None and name in file.spans:
                return file.view(name)
        raise ValueError(f"tensor {name!r} is in none of its files")

    def _order(self, first: int) -> list[int]:
        return sorted(range(self.info.world_size), key=lambda rank: (rank != first, rank))

    def _piece(self, family: str, name: str, rank: int) -> torch.Tensor:
        file = self._tensor_file(family, rank)
        if file is None or name not in file.spans:
            path = self._files.path(rank, self._plain(family, rank))
            raise CheckpointCorruptError(f"{path} lacks its part of the tensor {name!r}.")
        return file.view(name)


class _Tensors(Mapping[str, "torch.Tensor"]):
    """What `decode_state` asks for tensors: those stored whole at hand, sharded ones put together when asked for."""

    def __init__(
        self,
        opened: OpenCheckpoint,
        family: str,
        rank: int,
        given: Mapping[str, torch.Tensor],
        local: Local | None,
        copy: bool,
    ) -> None:
        self._opened = opened
        self._place = family, rank
        self._given = given
        self._local = local
        self._copy = copy

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._given[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)

    def sharded(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if self._local is not None:
            return self._local(name, shape, dtype)
        family, rank = self._place
        whole = self._opened.region(family, name, (0,) * len(shape), shape, rank)
        if whole.dtype != dtype:
            raise ValueError(f"tensor {name!r} is {whole.dtype} instead of {dtype}")
        return private_copies([whole])[0] if self._copy else whole


def read_objects(
    storage: Storage, info: CheckpointInfo, rank: int, *, only: str | None = None, keyring: Keyring | None = None
) -> dict[str, Any]:
    """The states that `rank` saved, by name, in memory of their own (`only` that one, without reading other files).

    Raises like `OpenCheckpoint`.
    """
    with OpenCheckpoint(storage, info, keyring) as opened:
        chosen = [name for name in opened.saved_by(rank) if only in (None, name)]
        opened.prefetch(chosen, rank)
        return {name: opened.state(name, rank) for name in chosen}


def _read_document(data: memoryview) -> dict[str, Any]:
    document = json.loads(str(data, "utf-8"))
    if not isinstance(document["objects"], dict) or not isinstance(document["pieces"], dict):
        raise TypeError("objects and pieces are not by name")
    return {"objects": document["objects"], "pieces": document["pieces"]}


def _tensor_names(tree: Any) -> Iterator[tuple[bool, str]]:
    """(whether it is sharded, name) of every tensor in a tree."""
    waiting = [tree]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting.extend(item)
        elif isinstance(item, dict):
            tag = item.get("$")
            if tag in ("tensor", "sharded"):
                yield tag == "sharded", item["name"]
            elif tag in ("bytes", "bytearray", "array") and "tensor" in item:
                yield False, item["tensor"]
            else:
                waiting.extend(item.values())


def _reason(error: Exception) -> str:
    return f"{error.args[0]!r} is missing" if isinstance(error, KeyError) and error.args else str(error)
