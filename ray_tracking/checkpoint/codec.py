"""Any nested training state as a JSON tree plus named tensors, and back, exactly. No pickle.

In: dict, list, tuple, numbers, strings, bytes, None, numpy and torch values, nested. Out: `Encoded`. No I/O.
What JSON can't say is a dict with the one key "$" naming the kind, so a plain dict with a key that begins
with "$" is tagged too.
"""

from __future__ import annotations

import base64
import math
import struct
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from ray_tracking.checkpoint.sharding import Piece, is_sharded, piece_of
from ray_tracking.errors import CheckpointError

MAX_DEPTH = 100
"""Deeper nesting is refused: it is a mistake, and Python's JSON reader could not come back from it."""
_INLINE_BYTES = 1024
_JSON_INT_BITS = 2048  # Python refuses to parse decimal integers of more than 4300 digits
_PLAIN_DTYPES = frozenset(
    {
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    }
)
"""What every safetensors version stores as it is; other dtypes go in as their bytes."""
_WHOLE_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes of an item: what parts of sharded tensors of other dtypes go in as, since regions are cut from them."""
_SEQUENCES: dict[type, str] = {tuple: "tuple", set: "set", frozenset: "frozenset", torch.Size: "size"}
_BUILD: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "size": torch.Size,
}


@dataclass(frozen=True, slots=True)
class Encoded:
    """`tree` is JSON-able and shares nothing with the state; `tensors` still alias the live tensors until
    copied.

    `aliases`: names that are tied to another tensor of this file -> the name it is stored under.
    `pieces`: names of sharded tensors -> this rank's part, in `tensors` too if this rank is to store it.
    """

    tree: Any
    tensors: dict[str, torch.Tensor]
    aliases: dict[str, str] = field(default_factory=dict)
    pieces: dict[str, Piece] = field(default_factory=dict)


@runtime_checkable
class ShardedTensors(Protocol):
    """A mapping of tensors given to `decode_state` that can also give tensors whose parts lie in several files."""

    def sharded(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor: ...


def encode_state(state: Any, name: str = "") -> Encoded:
    """Encode `state`; tensors are named by their dotted path below `name`.

    Raises CheckpointError that names the path and type of the first value that can't be stored.
    """
    encoder = _Encoder()
    tree = encoder.encode(state, name, 0)
    return Encoded(tree, encoder.tensors, encoder.aliases, encoder.pieces)


def decode_state(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The state again. Tied tensors are one tensor again. Raises ValueError, KeyError or TypeError on a
    tree that `encode_state` did not make.
    """
    return _decode(tree, tensors)


class _Encoder:
    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.aliases: dict[str, str] = {}
        self.pieces: dict[str, Piece] = {}
        self._stored: dict[tuple[Any, ...], str] = {}
        self._sharded_names: dict[int, str] = {}
        self._open: set[int] = set()

    def encode(self, value: Any, path: str, depth: int) -> Any:
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if kind is int:
            return value if value.bit_length() <= _JSON_INT_BITS else {"$": "int", "hex": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"$": "float", "hex": struct.pack(">d", value).hex()}
        if kind is complex:
            return {"$": "complex", "hex": struct.pack(">dd", value.real, value.imag).hex()}
        if kind in (bytes, bytearray):
            return self._bytes(value, path)
        if isinstance(value, torch.Tensor):
            return self._sharded(value, path) if is_sharded(value) else self._tensor(value, path)
        if isinstance(value, np.ndarray):
            return self._array(value, path)
        if isinstance(value, np.generic):
            _check_dtype(value.dtype, path)
            return {"$": "numpy", "dtype": value.dtype.str, "hex": value.tobytes().hex()}
        if kind is torch.dtype:
            return {"$": "dtype", "name": str(value).removeprefix("torch.")}
        if kind is torch.device:
            return {"$": "device", "name": str(value)}
        return self._container(value, path, depth)

    def _container(self, value: Any, path: str, depth: int) -> Any:
        if id(value) in self._open:
            raise CheckpointError(f"{path or 'the state'} contains itself; a checkpoint can't store that.")
        if depth >= MAX_DEPTH:
            raise CheckpointError(f"{path} is nested deeper than {MAX_DEPTH} levels; a checkpoint can't store that.")
        self._open.add(id(value))
        try:
            return self._open_container(value, path, depth)
        finally:
            self._open.discard(id(value))

    def _open_container(self, value: Any, path: str, depth: int) -> Any:
        kind = type(value)
        if kind is list:
            return self._items(value, path, depth)
        if kind in _SEQUENCES:
            return {"$": _SEQUENCES[kind], "items": self._items(value, path, depth)}
        if kind is deque:
            return {"$": "deque", "items": self._items(value, path, depth), "maxlen": value.maxlen}
        if kind is dict and all(type(key) is str and not key.startswith("$") for key in value):
            return {key: self.encode(item, _join(path, key), depth + 1) for key, item in value.items()}
        if kind in (dict, OrderedDict, Counter):
            return self._mapping(value, path, depth)
        raise CheckpointError(
            f"{path or 'the state'} is a {_name_of(kind)}, which a checkpoint can't store.",
            hint="Storable: dict, list, tuple, set, int, float, complex, str, bool, None, bytes, torch "
            "tensors, numpy arrays "
            "and scalars. Turn it into one of these in state_dict(), or leave it out.",
        )

    def _items(self, values: Any, path: str, depth: int) -> list[Any]:
        return [self.encode(item, _join(path, str(index)), depth + 1) for index, item in enumerate(values)]

    def _mapping(self, value: Mapping[Any, Any], path: str, depth: int) -> Any:
        tags = {dict: "dict", OrderedDict: "ordered", Counter: "counter"}
        items = [
            [
                self.encode(key, f"{path} (a key)", depth + 1),
                self.encode(item, _join(path, str(key)), depth + 1),
            ]
            for key, item in value.items()
        ]
        tree: dict[str, Any] = {"$": tags[type(value)], "items": items}
        versions = getattr(value, "_metadata", None)  # where Module.state_dict() keeps its modules' versions
        if versions is not None:
            tree["metadata"] = self.encode(versions, _join(path, "_metadata"), depth + 1)
        return tree

    def _bytes(self, value: bytes | bytearray, path: str) -> Any:
        tag = "bytes" if type(value) is bytes else "bytearray"
        if len(value) <= _INLINE_BYTES:
            return {"$": tag, "base64": base64.b64encode(value).decode("ascii")}
        return {"$": tag, "tensor": self._store(torch.frombuffer(bytearray(value), dtype=torch.uint8), path)}

    def _array(self, value: np.ndarray[Any, Any], path: str) -> Any:
        if type(value) is not np.ndarray:
            raise CheckpointError(f"{path} is a {_name_of(type(value))}; only a plain numpy.ndarray can be stored.")
        _check_dtype(value.dtype, path)
        raw = bytearray(np.ascontiguousarray(value).tobytes())
        tensor = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
        return {
            "$": "array",
            "dtype": value.dtype.str,
            "shape": list(value.shape),
            "tensor": self._store(tensor, path),
        }

    def _sharded(self, value: torch.Tensor, path: str) -> Any:
        dtype = str(value.dtype).removeprefix("torch.")
        whole = list(value.shape)
        # Tied where it is one object: memory tells nothing on the ranks whose part is empty, and all must agree.
        if id(value) in self._sharded_names:
            name = self._sharded_names[id(value)]
            self.aliases[self._free_name(path)] = name
            return {"$": "sharded", "name": name, "shape": whole, "dtype": dtype}
        piece = piece_of(value, path)
        _check_dense(piece.local, path)
        local = piece.local.detach().resolve_conj().resolve_neg()
        if local.dtype not in _PLAIN_DTYPES:
            if local.element_size() not in _WHOLE_NUMBERS:
                raise CheckpointError(f"{path} is a sharded tensor of {value.dtype}, which can't be stored.")
            local = local.view(_WHOLE_NUMBERS[local.element_size()])
        name = self._free_name(path)
        self._sharded_names[id(value)] = name
        self.tensors[name] = local
        self.pieces[name] = piece
        return {"$": "sharded", "name": name, "shape": whole, "dtype": dtype}

    def _tensor(self, value: torch.Tensor, path: str) -> Any:
        _check_dense(value, path)
        tensor = value.detach().resolve_conj().resolve_neg()
        if tensor.dtype in _PLAIN_DTYPES:
            return {"$": "tensor", "name": self._store(tensor, path)}
        dtype = str(tensor.dtype).removeprefix("torch.")
        raw = tensor.contiguous().reshape(-1).view(torch.uint8)
        return {"$": "tensor", "name": self._store(raw, path), "dtype": dtype, "shape": list(tensor.shape)}

    def _store(self, tensor: torch.Tensor, path: str) -> str:
        """Put it under a free name; a tensor that is another one (tied weights) is stored once."""
        name = self._free_name(path)
        place = (
            tensor.device,
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
        )
        known = self._stored.get(place)
        if known is not None and tensor.numel():
            self.aliases[name] = known
            return known
        self._stored[place] = name
        self.tensors[name] = tensor  # held, so that no later tensor can reuse its memory and pass for tied
        return name

    def _free_name(self, path: str) -> str:
        name = path or "value"
        while name in self.tensors or name in self.aliases or name == "__metadata__":
            name += "+"  # "a.b" may be a key or a path: both can occur in one state
        return name


def _join(path: str, part: str) -> str:
    return f"{path}.{part}" if path else part


def _name_of(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _check_dense(value: torch.Tensor, path: str) -> None:
    plain = type(value) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
    if not plain or value.layout is not torch.strided or value.is_meta or value.is_quantized:
        what = "sparse, quantized, meta or of a class of its own"
        raise CheckpointError(
            f"{path} is a {_name_of(type(value))} ({value.layout}, device {value.device}): a tensor "
            f"that is {what} "
            "can't be stored by this version.",
            hint="Store a plain dense tensor.",
        )


def _check_dtype(dtype: np.dtype[Any], path: str) -> None:
    if dtype.hasobject or dtype.names is not None or dtype.subdtype is not None or dtype.kind == "V":
        raise CheckpointError(
            f"{path} has the numpy dtype {dtype}, which a checkpoint can't store.",
            hint="Storable: numbers, bool, strings and dates of fixed width.",
        )


def _decode(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(tree, list):
        return [_decode(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "$" not in tree:
        return {key: _decode(item, tensors) for key, item in tree.items()}
    tag = tree["$"]
    decoder = _DECODERS.get(tag)
    if decoder is None:
        raise ValueError(f"unknown kind of value {tag!r}")
    return decoder(tree, tensors)


_Tree = dict[str, Any]
_Tensors = Mapping[str, torch.Tensor]


def _decode_mapping(tree: _Tree, tensors: _Tensors) -> Any:
    pairs = [(_decode(key, tensors), _decode(item, tensors)) for key, item in tree["items"]]
    if tree["$"] == "counter":
        return Counter(dict(pairs))
    if tree["$"] == "dict":
        return dict(pairs)
    ordered: OrderedDict[Any, Any] = OrderedDict(pairs)
    if "metadata" in tree:
        ordered._metadata = _decode(tree["metadata"], tensors)  # type: ignore[attr-defined]
    return ordered


def _decode_sequence(tree: _Tree, tensors: _Tensors) -> Any:
    return _BUILD[tree["$"]]([_decode(item, tensors) for item in tree["items"]])


def _decode_deque(tree: _Tree, tensors: _Tensors) -> Any:
    return deque((_decode(item, tensors) for item in tree["items"]), maxlen=tree["maxlen"])


def _decode_sharded(tree: _Tree, tensors: _Tensors) -> torch.Tensor:
    """A source of tensors that knows all ranks' files puts the parts together (or gives what its user asked for)."""
    if not isinstance(tensors, ShardedTensors):
        raise ValueError("a sharded tensor, of which only one rank's part is at hand")
    return tensors.sharded(tree["name"], tuple(tree["shape"]), _torch_dtype(tree["dtype"]))


def _decode_bytes(tree: _Tree, tensors: _Tensors) -> Any:
    kind = bytes if tree["$"] == "bytes" else bytearray
    if "base64" in tree:
        return kind(base64.b64decode(tree["base64"], validate=True))
    return kind(tensors[tree["tensor"]].numpy().tobytes())


def _decode_array(tree: _Tree, tensors: _Tensors) -> Any:
    raw = tensors[tree["tensor"]].numpy().tobytes()
    return np.frombuffer(bytearray(raw), dtype=_dtype(tree["dtype"])).reshape(tree["shape"])


def _decode_scalar(tree: _Tree, tensors: _Tensors) -> Any:
    return np.frombuffer(bytes.fromhex(tree["hex"]), dtype=_dtype(tree["dtype"]))[0]


def _decode_tensor(tree: _Tree, tensors: _Tensors) -> torch.Tensor:
    tensor = tensors[tree["name"]]
    if "dtype" not in tree:
        return tensor
    return tensor.view(_torch_dtype(tree["dtype"])).reshape(tree["shape"])


def _dtype(name: str) -> np.dtype[Any]:
    dtype = np.dtype(name)
    if dtype.hasobject:
        raise ValueError(f"numpy dtype {name!r} holds Python objects")
    return dtype


def _torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"this torch has no dtype {name!r}")
    return dtype


def _unpack_float(tree: _Tree, tensors: _Tensors) -> float:
    value: float = struct.unpack(">d", bytes.fromhex(tree["hex"]))[0]
    return value


_DECODERS: dict[str, Callable[[_Tree, _Tensors], Any]] = {
    "sharded": _decode_sharded,
    "dict": _decode_mapping,
    "ordered": _decode_mapping,
    "counter": _decode_mapping,
    "tuple": _decode_sequence,
    "set": _decode_sequence,
    "frozenset": _decode_sequence,
    "size": _decode_sequence,
    "deque": _decode_deque,
    "bytes": _decode_bytes,
    "bytearray": _decode_bytes,
    "array": _decode_array,
    "numpy": _decode_scalar,
    "tensor": _decode_tensor,
    "int": lambda tree, _: int(tree["hex"], 16),
    "float": _unpack_float,
    "complex": lambda tree, _: complex(*struct.unpack(">dd", bytes.fromhex(tree["hex"]))),
    "dtype": lambda tree, _: _torch_dtype(tree["name"]),
    "device": lambda tree, _: torch.device(tree["name"]),
}
