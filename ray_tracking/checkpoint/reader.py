"""Reading a complete checkpoint: states, tensors or parts of them, from files that are verified before their first use.

In: a Storage, a `CheckpointInfo`, the keys of encrypted ones. Out: states by name. Torch is loaded only by states and
tensors.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ray_tracking.checkpoint import manifest as names
from ray_tracking.checkpoint.keys import Keyring
from ray_tracking.checkpoint.manifest import CheckpointInfo
from ray_tracking.checkpoint.state_tree import StateTree, read_document, read_tree
from ray_tracking.checkpoint.tensor_views import TensorFile, private_copies
from ray_tracking.checkpoint.verified import CheckpointFiles, UnreadFile, open_verified, problems, sealing_of
from ray_tracking.errors import CheckpointCorruptError
from ray_tracking.storage import Storage

if TYPE_CHECKING:
    import torch

__all__ = ["Local", "OpenCheckpoint", "open_verified", "problems", "read_objects", "sealing_of"]

Local = Callable[[str, tuple[int, ...], "torch.dtype"], "torch.Tensor"]
"""(name, whole shape, dtype) of a sharded tensor -> the tensor to stand for it in a state."""
DAMAGE = (
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

    `nearby` may hold copies of some files, under the names on storage: they are tried first, and verified alike.
    For one thread. Everything here raises CheckpointCorruptError that names the file that is not what was saved,
    WrongKeyError where the keys do not open it, StorageError where storage can't be read.
    """

    def __init__(
        self,
        storage: Storage,
        info: CheckpointInfo,
        keyring: Keyring | None = None,
        nearby: Storage | None = None,
    ) -> None:
        self.info = info
        self.path = storage.path(info.folder)
        self._files = CheckpointFiles(storage, info, keyring, nearby)
        self._documents: dict[int, dict[str, Any]] = {}
        self._trees: dict[tuple[int, str], StateTree] = {}
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

    @property
    def from_nearby(self) -> int:
        """Bytes that were read from there so far."""
        sizes = {name: entry.size for manifest in self.info.manifests for name, entry in manifest.files.items()}
        return sum(sizes[name] for name in self._files.from_nearby)

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
        tree = self.tree(name, rank)
        with self._reading(tree.where):
            given = {each: self._find(tree.family, each, rank) for each in tree.whole}
        if copy:
            given = dict(zip(given, private_copies(given.values()), strict=True))
        for each, (shape, dtype_name) in tree.sharded.items():
            with self._reading(tree.where):
                dtype = _torch_dtype(dtype_name)
            # What the caller's function raises is no damage of the checkpoint.
            given[each] = local(each, shape, dtype) if local else self._whole(tree, each, shape, dtype, rank, copy)
        with self._reading(tree.where):
            return decode_state(tree.body, _Given(given))

    def states(self, rank: int = 0, *, copy: bool = True, local: Local | None = None) -> dict[str, Any]:
        """All of `names(rank)`. Files are checked on several threads."""
        self.prefetch(self.names(rank), rank)
        return {name: self.state(name, rank, copy=copy, local=local) for name in self.names(rank)}

    def prefetch(self, objects: Iterable[str], rank: int = 0) -> None:
        """Read and check now, on several threads, all files that the states of `objects` lie in."""
        trees = [self.tree(name, rank) for name in objects]
        # Of a sharded one a rank wants few files; which, shows later.
        needs = dict.fromkeys(place for tree in trees if not tree.sharded for place in self.places(tree))
        missing = [place for place in needs if place not in self._tensors]
        self._files.open_all([(each, self._plain(family, each)) for each, family in missing])
        for each, family in missing:
            self._tensor_file(family, each)

    def places(self, tree: StateTree) -> list[tuple[int, str]]:
        """The (rank, family) of all files that tensors of a tree may lie in."""
        ranks = (tree.where,) if tree.where else range(self.info.world_size)
        return [(each, tree.family) for each in ranks] if tree.whole else []

    def has_file(self, family: str, rank: int) -> bool:
        return self._files.has(rank, self._plain(family, rank))

    def unread(self, family: str, rank: int) -> UnreadFile | None:
        """The file, if its bytes can be put anywhere as they are read. It is open until `close`."""
        return self._files.unread(rank, self._plain(family, rank))

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
            places = self._places(name, rank)
            if not places:
                return regions.cut(self._find(family, name, rank), offset, size)
            return regions.assemble(places, lambda each: self._piece(family, name, each), offset, size)

    def parts(
        self,
        family: str,
        name: str,
        offset: tuple[int, ...],
        size: tuple[int, ...],
        dtype: torch.dtype,
        rank: int = 0,
    ) -> list[tuple[Sequence[int], torch.Tensor]]:
        """`region` of a sharded tensor as views of the files, and where in it each begins."""
        from ray_tracking.checkpoint import regions

        with self._reading(0):
            places = self._places(name, rank)
            if not places:
                raise ValueError(f"no rank stored a part of the tensor {name!r}")
            found = regions.parts(places, lambda each: self._piece(family, name, each), offset, size)
            return [(begin, _as_dtype(name, part, dtype)) for begin, part in found]

    def family_of(self, name: str, rank: int = 0) -> str:
        """The family of files that the tensors of an object lie in."""
        return self.tree(name, rank).family

    def _places(self, name: str, rank: int) -> dict[int, tuple[int, ...]]:
        """Where the part of a tensor begins that each rank stored, in the order in which they are to be tried."""
        pieces = {each: self._document(each)["pieces"] for each in self._order(rank)}
        return {each: tuple(known[name]) for each, known in pieces.items() if name in known}

    # -- trees -------------------------------------------------------------------------------------

    def _document(self, rank: int) -> dict[str, Any]:
        if rank not in self._documents:
            plain = names.state_file(rank)
            memory = self._files.open(rank, plain)
            if memory is None:
                raise CheckpointCorruptError(f"{self._files.path(rank, plain)} is not in the manifest of rank {rank}.")
            try:
                with self._reading(rank):
                    self._documents[rank] = read_document(memory.view)
            finally:
                self._files.drop(rank, plain)
        return self._documents[rank]

    def tree(self, name: str, rank: int) -> StateTree:
        """What is stored of an object, without its tensors. KeyError without it."""
        where = rank if name in self._document(rank)["objects"] else 0
        if (where, name) not in self._trees:
            entry = self._document(where)["objects"][name]
            with self._reading(where):
                self._trees[where, name] = read_tree(where, entry)
        return self._trees[where, name]

    @contextmanager
    def _reading(self, rank: int) -> Iterator[None]:
        """What fails in here fails because of what the state file of `rank` says."""
        try:
            yield
        except DAMAGE as error:
            path = self._files.path(rank, names.state_file(rank))
            raise CheckpointCorruptError(f"{path} is not what a checkpoint holds: {_reason(error)}.") from error

    # -- tensors -----------------------------------------------------------------------------------

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

    def _whole(
        self, tree: StateTree, name: str, shape: tuple[int, ...], dtype: torch.dtype, rank: int, copy: bool
    ) -> torch.Tensor:
        whole = self.region(tree.family, name, (0,) * len(shape), shape, rank)
        with self._reading(tree.where):
            whole = _as_dtype(name, whole, dtype)
        return private_copies([whole])[0] if copy else whole


class _Given(dict[str, "torch.Tensor"]):
    """What `decode_state` asks for tensors; sharded ones are put together already."""

    def sharded(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self[name]


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


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"this torch has no dtype {name!r}")
    return dtype


def _as_dtype(name: str, stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A part of a sharded tensor; dtypes that not every safetensors file can hold are stored as whole numbers."""
    if stored.dtype == dtype:
        return stored
    if stored.is_floating_point() or stored.element_size() != dtype.itemsize:
        raise ValueError(f"tensor {name!r} is {stored.dtype} instead of {dtype}")
    return stored.view(dtype)


def _reason(error: Exception) -> str:
    return f"{error.args[0]!r} is missing" if isinstance(error, KeyError) and error.args else str(error)
