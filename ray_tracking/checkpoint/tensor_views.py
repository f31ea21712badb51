"""A safetensors file in memory: its header, read strictly, and its tensors as views. Torch is loaded by the first view.

In: the bytes of a file, whoever wrote it. Out: names, shapes, tensors. ValueError, with the reason, for anything that
is not exactly a safetensors file: no hole, no overlap, nothing outside, no name twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from ray_tracking.checkpoint.mapping import ALIGNMENT, room

if TYPE_CHECKING:
    import torch

_MOST_HEADER = 100 << 20
"""The limit of the safetensors library."""
_MOST_ITEMS = 1 << 60
_MOST_DIMENSIONS = 64
_DTYPES: dict[str, tuple[str, int]] = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "F32": ("float32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
}
"""safetensors' names: torch's name, bytes of an item."""


class Span(NamedTuple):
    """Where a tensor lies: `begin` in bytes from the file's first byte. `dtype` as safetensors calls it."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    items: int

    @property
    def size(self) -> int:
        """In bytes."""
        return self.items * _DTYPES[self.dtype][1]

    def torch_dtype(self, name: str) -> torch.dtype:
        """ValueError, with the tensor's name, if this torch has no such dtype."""
        import torch

        torch_name = _DTYPES[self.dtype][0]
        dtype = getattr(torch, torch_name, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"no file this torch reads: tensor {name!r} has the dtype {torch_name}")
        return dtype


class TensorFile:
    """The tensors of one file. Views are valid as long as they exist, even when `data` is let go elsewhere."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self.spans, self.metadata = parse_header(data)

    @property
    def tied(self) -> dict[str, str]:
        """Names left out of the file because another tensor is the same one -> that tensor's name."""
        return {name: kept for name, kept in self.metadata.items() if kept in self.spans and name not in self.spans}

    def view(self, name: str) -> torch.Tensor:
        """The tensor, without a copy (with one if it is not aligned for its dtype). KeyError without it."""
        import torch

        span = self.spans[name]
        dtype = span.torch_dtype(name)
        if span.items == 0:
            return torch.empty(span.shape, dtype=dtype)
        flat = torch.frombuffer(self._data, dtype=torch.uint8, count=span.size, offset=span.begin)
        if flat.data_ptr() % dtype.itemsize:
            return flat.clone().view(dtype).reshape(span.shape)
        return torch.frombuffer(self._data, dtype=dtype, count=span.items, offset=span.begin).reshape(span.shape)


def header_size(begin: memoryview, size: int) -> int:
    """Bytes before the first tensor of a file of `size` bytes, from its first nine."""
    length = int.from_bytes(begin[:8], "little")
    if len(begin) < 9 or not 2 <= length <= min(_MOST_HEADER, size - 8) or begin[8] != ord("{"):
        raise ValueError("not a safetensors file")
    return 8 + length


def parse_header(data: memoryview, size: int | None = None) -> tuple[dict[str, Span], dict[str, str]]:
    """(place of every tensor, metadata). `size`: that of the file, where `data` is no more than its header."""
    size = len(data) if size is None else size
    length = header_size(data[:9], size) - 8
    try:
        header = json.loads(str(data[8 : 8 + length], "utf-8"), object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a safetensors file: its header is damaged ({error})") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("not a safetensors file: its metadata are no texts")
    spans: dict[str, Span] = {}
    ranges = []
    for name, entry in header.items():
        span, end = _span(name, entry, 8 + length)
        spans[name] = span
        ranges.append((span.begin, end, name))
    at = 8 + length
    for begin, end, name in sorted(ranges):
        if begin != at:
            raise ValueError(f"not a safetensors file: tensor {name!r} begins at {begin} instead of {at}")
        at = end
    if at != size:
        raise ValueError(f"not a safetensors file: its tensors end at {at}, the file at {size}")
    return spans, metadata


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    known = dict(pairs)
    if len(known) != len(pairs):
        raise ValueError("a name stands in it twice")
    return known


def _span(name: str, entry: Any, data_begin: int) -> tuple[Span, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"not a safetensors file: the entry of tensor {name!r} is of another kind")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"no file this version reads: tensor {name!r} has the dtype {dtype!r}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"not a safetensors file: tensor {name!r} has the shape {shape!r} at {offsets!r}")
    if math.prod(size for size in shape if size) >= _MOST_ITEMS:
        raise ValueError(f"not a safetensors file: tensor {name!r} has the shape {shape}, more than a tensor can have")
    count = math.prod(shape)
    if offsets[1] - offsets[0] != count * _DTYPES[dtype][1]:
        raise ValueError(f"not a safetensors file: tensor {name!r} has {offsets} for {count} items of {dtype}")
    return Span(dtype, tuple(shape), data_begin + offsets[0], count), data_begin + offsets[1]


def _are_sizes(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= _MOST_DIMENSIONS
        and all(type(value) is int and 0 <= value < _MOST_ITEMS for value in values)
    )


def private_copies(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Contiguous copies with memory that is theirs alone: one stretch for all, given back with the last of them."""
    import torch

    from ray_tracking.checkpoint.copying import copy_all

    sources = list(tensors)
    begins = []
    size = 0
    for source in sources:
        begins.append(size)
        size += -(-source.nbytes // ALIGNMENT) * ALIGNMENT
    memory = room(size)
    copies = []
    moves = []
    for source, begin in zip(sources, begins, strict=True):
        if source.numel() == 0 or source.device.type != "cpu":
            copies.append(source.clone(memory_format=torch.contiguous_format))
            continue
        flat = torch.frombuffer(memory, dtype=source.dtype, count=source.numel(), offset=begin)
        copies.append(flat.view(source.shape))
        moves.append((copies[-1], source))
    copy_all(moves)
    return copies
