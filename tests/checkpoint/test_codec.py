from __future__ import annotations

import json
import math
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_tracking.checkpoint.codec import Encoded, decode_state, encode_state
from ray_tracking.errors import CheckpointError


def through_bytes(encoded: Encoded) -> dict[str, torch.Tensor]:
    """The tensors as any program reads them from a safetensors file."""
    tensors = {name: tensor.clone().contiguous() for name, tensor in encoded.tensors.items()}
    return safetensors.torch.load(safetensors.torch.save(tensors))


def round_trip(state: Any) -> Any:
    """Through the real bytes of both files."""
    encoded = encode_state(state, "state")
    tree = json.loads(json.dumps(encoded.tree, allow_nan=False))
    return decode_state(tree, through_bytes(encoded))


def same(a: Any, b: Any) -> bool:
    """Equal in type, order and every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, np.generic):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(x, y) and same(a[x], b[y]) for x, y in zip(a, b, strict=True))
    if isinstance(a, (list, tuple, deque)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


HARD = {
    "floats": [0.1, -0.0, math.nan, -math.nan, math.inf, -math.inf, 5e-324, 1.7976931348623157e308],
    "nan with a payload": struct.unpack("d", struct.pack("Q", 0x7FF8000000000123))[0],
    "ints": [2**53 + 1, -(2**63) - 1, 2**4000, 0, True, False],
    "complex": complex(-0.0, math.inf),
    "none": None,
    "strings": ["", "ü", "\ud800", "\0", "$", "😀"],
    "bytes": [b"", b"\x00\xff", bytes(range(256)) * 8, bytearray(b"abc")],
    "tuple or list": [(1, 2), [1, 2], (), [], ((1,), [(2,)])],
    "keys": {0: "a", 1.5: "b", True: "c", None: "d", (1, "x"): "e", "plain": "f"},
    "looks like a tag": {"$": "tensor", "name": "x"},
    "a key with a dollar": {"$price": 1},
    "order": {"z": 1, "a": 2, "m": 3},
    "ordered": OrderedDict([("b", 1), ("a", torch.ones(2))]),
    "counter": Counter({30: 1, 80: 2}),
    "sets": [{1, 2}, frozenset({"a"})],
    "deque": deque([1, 2], maxlen=5),
    "empty": {},
    "torch types": [torch.float16, torch.device("cuda:1"), torch.Size([2, 3])],
    "arrays": [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.array(3.5),
        np.empty((0, 4), dtype=np.int16),
        np.array(["a", "bcd"]),
        np.array([1, 2], dtype=">u2"),
        np.array(["2026-01-01"], dtype="datetime64[D]"),
        np.array([1 + 2j]),
    ],
    "numpy scalars": [
        np.float64(0.1),
        np.float32("nan"),
        np.int8(-1),
        np.bool_(True),
        np.str_("a"),
        np.float16(1),
    ],
    "tensors": [
        torch.tensor(3.5),
        torch.empty(0, 3),
        torch.tensor([True, False]),
        torch.arange(6).reshape(2, 3).t(),
        torch.ones(1).expand(5),
        torch.arange(10)[::3],
        torch.randn(3, dtype=torch.bfloat16),
        torch.randn(3).half(),
        torch.tensor([1 + 2j, -1j]),
        torch.tensor([1 + 2j]).conj(),
        torch.tensor(1j, dtype=torch.complex128),
        torch.tensor([1, 2], dtype=torch.uint16),
        torch.tensor([math.nan, -0.0, math.inf]),
        torch.randn(4, 2, 3, 3).to(memory_format=torch.channels_last),
        torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn),
    ],
}


@pytest.mark.parametrize("name", HARD)
def test_round_trip_is_exact(name: str) -> None:
    assert same(round_trip(HARD[name]), HARD[name])
    assert same(round_trip({"nested": [HARD[name]]}), {"nested": [HARD[name]]})


def test_the_comparison_itself_can_fail() -> None:
    assert not same((1,), [1])
    assert not same({"a": 1, "b": 2}, {"b": 2, "a": 1})
    assert not same(0.0, -0.0)
    assert not same(torch.ones(2), torch.ones(2, dtype=torch.float64))


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(max_size=2000),
    st.builds(lambda xs: torch.tensor(xs), st.lists(st.floats(width=32), max_size=4)),
    st.builds(lambda xs: np.array(xs, dtype=np.int64), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4)),
)
keys = st.one_of(st.text(max_size=4), st.integers(), st.sampled_from(["$", "a.b", "a", "__metadata__", "tensor"]))


@given(
    st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.lists(inner, max_size=4).map(tuple),
            st.dictionaries(keys, inner, max_size=4),
        ),
        max_leaves=20,
    )
)
def test_any_nested_state_round_trips(state: Any) -> None:
    assert same(round_trip(state), state)


def test_names_that_collide_are_kept_apart() -> None:
    state = {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}, "__metadata__": torch.ones(2)}
    assert same(round_trip(state), state)


def test_tied_weights_are_stored_once_and_tied_again() -> None:
    weight = torch.randn(3, 2)
    encoded = encode_state({"head": weight, "embed": weight, "other": weight.clone(), "view": weight[:1]})
    assert list(encoded.tensors) == ["head", "other", "view"]
    assert encoded.aliases == {"embed": "head"}
    state = decode_state(encoded.tree, through_bytes(encoded))
    assert state["head"] is state["embed"]
    assert state["other"] is not state["head"]
    assert torch.equal(state["view"], weight[:1])


def test_module_versions_survive() -> None:
    state = torch.nn.BatchNorm1d(2).state_dict()
    assert round_trip(state)._metadata == state._metadata


def test_parameters_lose_only_their_graph() -> None:
    back = round_trip({"p": torch.nn.Parameter(torch.ones(2))})["p"]
    assert torch.equal(back, torch.ones(2))
    assert not back.requires_grad


class _Own:
    pass


loop: list[Any] = []
loop.append(loop)
deep: list[Any] = []
for _ in range(300):
    deep = [deep]


@pytest.mark.parametrize(
    ("state", "path", "what"),
    [
        ({"opt": {"hook": [1, _Own()]}}, "state.opt.hook.1", "_Own"),
        ({"f": print}, "state.f", "builtin_function_or_method"),
        ({"d": defaultdict(int)}, "state.d", "collections.defaultdict"),
        ({"o": np.array([object()])}, "state.o", "object"),
        ({"s": torch.ones(2, 2).to_sparse()}, "state.s", "sparse"),
        ({"m": torch.ones(2, device="meta")}, "state.m", "meta"),
        ({(_Own,): 1}, "state", "type"),
        (loop, "state.0", "contains itself"),
        (deep, "state.0.0", "nested deeper"),
    ],
)
def test_what_cannot_be_stored_is_named(state: Any, path: str, what: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        encode_state(state, "state")
    assert str(caught.value).startswith(path)
    assert what in str(caught.value)


@pytest.mark.parametrize(
    "tree",
    [
        {"$": "exec", "code": "1"},
        {"$": "tensor", "name": "missing"},
        {"$": "numpy", "dtype": "O", "hex": "00"},
        {"$": "array", "dtype": "|O", "shape": [1], "tensor": "t"},
        {"$": "tensor", "name": "t", "dtype": "load", "shape": [1]},
        {"$": ["list"]},
        {"$": "tuple"},
    ],
)
def test_a_foreign_tree_raises_and_nothing_else(tree: Any) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        decode_state(tree, {"t": torch.zeros(8, dtype=torch.uint8)})
