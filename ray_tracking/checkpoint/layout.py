"""How tensors lie in a safetensors file, and which rank writes which of them. Pure: no I/O, no torch.

In: names, dtypes, shapes, sizes. Out: a file's header with every tensor's place; an owner for every tensor.
"""

from __future__ import annotations

import heapq
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

_DATA_ALIGNMENT = 64
_LENGTH = struct.Struct("<Q")


class TensorSpec(NamedTuple):
    """`dtype` as safetensors calls it (F32, BF16 ...); `item` and `size` in bytes."""

    dtype: str
    shape: tuple[int, ...]
    item: int
    size: int


@dataclass(frozen=True, slots=True)
class FileLayout:
    """A safetensors file: its first bytes, where each tensor begins, its whole size."""

    header: bytes
    offsets: Mapping[str, int]
    size: int


def file_layout(tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> FileLayout:
    """Tensors by descending size of their items, then name, without holes: so each is aligned for its dtype.

    The header is padded with spaces, as the format allows, so that the data begins at a multiple of 64 bytes.
    """
    ordered = sorted(tensors.items(), key=lambda one: (-one[1].item, one[0]))
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    begins: dict[str, int] = {}
    end = 0
    for name, spec in ordered:
        begins[name] = end
        end += spec.size
        entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [begins[name], end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + _LENGTH.size) % _DATA_ALIGNMENT)
    header = _LENGTH.pack(len(text)) + text
    return FileLayout(header, {name: len(header) + begin for name, begin in begins.items()}, len(header) + end)


def spread(sizes: Mapping[str, int], world_size: int) -> dict[str, int]:
    """An owner (rank) for every tensor: the largest first, each to the rank that has the fewest bytes so far.

    Depends on nothing but its arguments, so that ranks which hold the same state agree without a message.
    """
    loads = [(0, rank) for rank in range(world_size)]
    owners = {}
    for name, size in sorted(sizes.items(), key=lambda one: (-one[1], one[0])):
        load, rank = heapq.heappop(loads)
        owners[name] = rank
        heapq.heappush(loads, (load + size, rank))
    return owners
