"""States of a checkpoint whose tensors are not read yet: known by name, shape and dtype, each with a place to go to.

In: an `OpenCheckpoint`. Out: drafts of states, to decide by where their tensors are to go; then, when `read` has
returned True, the states, with every byte of their files verified. For one thread; reading uses several.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ray_tracking.checkpoint.codec import decode_state
from ray_tracking.checkpoint.mapping import ALIGNMENT, room
from ray_tracking.checkpoint.reader import OpenCheckpoint
from ray_tracking.checkpoint.scatter import Reading, read_all
from ray_tracking.checkpoint.tensor_views import Span, header_size, parse_header
from ray_tracking.checkpoint.verified import UnreadFile

_MOST_UNWANTED = 0.25
"""The share of all bytes that may belong to no state that is wanted. They are read too, into memory that is let go."""
_FEW = 1 << 20
"""So many may in any case."""

Want = tuple[str, int]
"""An object, and the rank whose state of it is wanted."""
_Key = tuple[str, str]
"""The family of a tensor's file, and its name."""


@dataclass(frozen=True, slots=True)
class _File:
    opened: UnreadFile
    family: str
    head: bytes
    spans: Mapping[str, Span]
    """In the order of the file."""


class UnreadStates:
    """The states of some objects, to be read before the checkpoint is closed."""

    def __init__(self, opened: OpenCheckpoint, wants: Iterable[Want]) -> None:
        """ValueError and its like, or RayTrackingError, if they can't be read so: nothing is proven to be damaged."""
        self._trees = {want: opened.tree(*want) for want in wants}
        if any(tree.sharded for tree in self._trees.values()):
            raise ValueError("of sharded tensors only parts are read")
        self._drafts: dict[_Key, torch.Tensor] = {}
        self._keys: dict[int, _Key] = {}
        """By id of a draft's tensor."""
        self._live: dict[_Key, torch.Tensor] = {}
        self._files = self._open(opened)
        self._parts = self._provide()

    @property
    def filled(self) -> Sequence[torch.Tensor]:
        """The tensors of the caller that `read` writes into."""
        return list(self._live.values())

    def draft(self, want: Want) -> Any:
        """The state, with tensors, arrays and bytes of which nothing but the shape and the dtype is right."""
        return self._decoded(want, self._drafts)

    def put_into(self, stored: torch.Tensor, live: torch.Tensor) -> None:
        """Read into `live`, contiguous and in main memory, what a draft's tensor stands for."""
        self._live[self._keys[id(stored)]] = live

    def can_be_put(self, stored: torch.Tensor) -> bool:
        """Whether it is a draft's tensor that nobody has said so of yet."""
        key = self._keys.get(id(stored))
        return key is not None and key not in self._live

    def read(self) -> bool:
        """Read all files. False if a byte is not what was saved: then nothing of it is to be used."""
        readings = []
        for file, parts in zip(self._files, self._parts, strict=True):
            memory = [_memory_of(self._live[key]) if key in self._live else part for key, part in parts]
            readings.append(Reading(file.opened.source, file.head, memory, file.opened.digest))
        good = read_all(readings)
        torch.autograd.graph.increment_version(self._live.values())
        return good

    def state(self, want: Want) -> Any:
        """What was saved: in the tensors given to `put_into`, and others with memory of their own."""
        return self._decoded(want, {**self._drafts, **self._live})

    def _decoded(self, want: Want, tensors: Mapping[_Key, torch.Tensor]) -> Any:
        tree = self._trees[want]
        return decode_state(tree.body, {name: tensors[tree.family, name] for name in tree.whole})

    def _open(self, opened: OpenCheckpoint) -> list[_File]:
        """All files that the states may lie in."""
        files = []
        for rank, family in dict.fromkeys(place for tree in self._trees.values() for place in opened.places(tree)):
            if opened.has_file(family, rank):
                file = opened.unread(family, rank)
                if file is None:
                    raise ValueError("not a plain file of a local file system")
                files.append(_with_header(file, family))
        return files

    def _provide(self) -> list[list[tuple[_Key, memoryview]]]:
        """A tensor for each that is wanted; and the memory for each that a file holds, in its order."""
        wanted = {(tree.family, name) for tree in self._trees.values() for name in tree.whole}
        spans = [((file.family, name), span) for file in self._files for name, span in file.spans.items()]
        if len({key for key, _ in spans}) < len(spans):
            raise ValueError("a tensor is in two files")
        begins, size, unwanted = {}, 0, 0
        for key, span in spans:
            if key in wanted:
                begins[key] = size
                size += -(-span.size // ALIGNMENT) * ALIGNMENT
            else:
                unwanted += span.size
        if unwanted > max(_MOST_UNWANTED * (size + unwanted), _FEW):
            raise ValueError("most of the files is not wanted")
        memory, others = room(size), room(unwanted)
        places: dict[_Key, memoryview] = {}
        for key, span in spans:
            if key not in wanted:
                places[key], others = others[: span.size], others[span.size :]
                continue
            begin = begins[key]
            places[key] = memory[begin : begin + span.size]
            self._drafts[key] = _tensor(key[1], span, memory, begin)
            self._keys[id(self._drafts[key])] = key
        return [[((file.family, name), places[file.family, name]) for name in file.spans] for file in self._files]


def _with_header(file: UnreadFile, family: str) -> _File:
    begin = memoryview(bytearray(9))
    file.source.scatter([begin], 0)
    head = memoryview(bytearray(header_size(begin, file.source.size)))
    file.source.scatter([head], 0)
    spans, _ = parse_header(head, file.source.size)
    return _File(file, family, bytes(head), dict(sorted(spans.items(), key=lambda one: (one[1].begin, one[1].items))))


def _tensor(name: str, span: Span, memory: memoryview, begin: int) -> torch.Tensor:
    dtype = span.torch_dtype(name)
    if not span.items:
        return torch.empty(span.shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=span.items, offset=begin).view(span.shape)


def _memory_of(tensor: torch.Tensor) -> memoryview:
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
