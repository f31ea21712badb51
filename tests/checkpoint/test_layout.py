from __future__ import annotations

import itertools
import json
import struct

import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_tracking.checkpoint.layout import TensorSpec, file_layout, spread
from ray_tracking.checkpoint.staging import Stager
from ray_tracking.checkpoint.state import describe

NAMES = st.text(min_size=1, max_size=20)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(NAMES, st.integers(0, 10**9), max_size=40), st.integers(1, 9))
def test_every_tensor_has_one_owner_and_shares_are_balanced(sizes: dict[str, int], world_size: int) -> None:
    owners = spread(sizes, world_size)
    assert owners.keys() == sizes.keys()
    assert owners == spread(dict(reversed(sizes.items())), world_size), "whatever the order"
    loads = [sum(sizes[name] for name, owner in owners.items() if owner == rank) for rank in range(world_size)]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)


def test_a_layout_is_aligned_and_without_holes() -> None:
    specs = {
        "half": TensorSpec("F16", (3,), 2, 6),
        "b": TensorSpec("F32", (2, 2), 4, 16),
        "byte": TensorSpec("U8", (5,), 1, 5),
        "long": TensorSpec("I64", (), 8, 8),
        "nothing": TensorSpec("F64", (0, 4), 8, 0),
        "größe\n": TensorSpec("F32", (1,), 4, 4),
    }
    layout = file_layout(specs, {"format": "pt"})
    (length,) = struct.unpack("<Q", layout.header[:8])
    assert len(layout.header) == 8 + length
    assert len(layout.header) % 64 == 0
    header = json.loads(layout.header[8:])
    assert header.pop("__metadata__") == {"format": "pt"}
    spans = sorted(entry["data_offsets"] for entry in header.values())
    assert spans[0][0] == 0
    assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))
    assert layout.size == len(layout.header) + spans[-1][1]
    assert all(layout.offsets[name] % specs[name].item == 0 for name in specs)


def test_what_is_staged_is_what_safetensors_reads() -> None:
    model = torch.nn.Linear(3, 2).to(torch.bfloat16)
    state = {**model.state_dict(), "turned": torch.arange(6.0).reshape(2, 3).T, "flag": torch.tensor([True, False])}
    description = describe({"model": state}, step=1, include_rng=False)
    memory = memoryview(bytearray(Stager.size_of(description)))
    snapshot = Stager().stage(description, memory)
    read = safetensors.torch.load(bytes(snapshot.files["model.safetensors"]))
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], value) for name, value in state.items())


def test_a_buffer_is_used_again_also_for_another_structure() -> None:
    stager = Stager()
    memory = memoryview(bytearray(1 << 16))
    for state in ({"w": torch.ones(4)}, {"w": torch.zeros(4)}, {"v": torch.arange(9.0)}, {"w": torch.ones(4)}):
        snapshot = stager.stage(describe({"model": state}, step=1, include_rng=False), memory)
        read = safetensors.torch.load(bytes(snapshot.files["model.safetensors"]))
        assert all(torch.equal(read[name], value) for name, value in state.items())
