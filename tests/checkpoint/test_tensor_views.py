from __future__ import annotations

import json
from typing import Any

import pytest
import safetensors.torch
import torch

from ray_tracking.checkpoint.tensor_views import TensorFile, parse_header, private_copies

ALL = {
    str(dtype): torch.arange(6).to(dtype).reshape(2, 3)
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.complex64,
    )
}  # fmt: skip
ALL |= {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 3), "odd": torch.arange(3, dtype=torch.int8)}


def writable(data: bytes) -> memoryview:
    return memoryview(bytearray(data))


def file_of(header: Any, data: bytes = b"", *, length: int | None = None) -> memoryview:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return writable((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def entry(shape: Any, offsets: Any, dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def test_what_the_safetensors_library_writes_is_read_without_a_copy() -> None:
    data = writable(safetensors.torch.save(ALL, {"format": "pt", "b": "scalar"}))
    file = TensorFile(data)
    assert file.spans.keys() == ALL.keys()
    assert file.tied == {"b": "scalar"}
    for name, tensor in ALL.items():
        view = file.view(name)
        assert (view.dtype, view.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(view.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    file.view("scalar").fill_(7)
    assert file.view("scalar").item() == 7, "the same memory"


def test_a_file_that_is_not_aligned_is_copied() -> None:
    values = torch.arange(4.0)
    for pad in range(4):
        header = json.dumps({"x": entry([4], [0, 16])}).encode() + b" " * pad
        view = TensorFile(file_of(header, values.numpy().tobytes())).view("x")
        assert torch.equal(view, values)
        assert view.data_ptr() % 4 == 0


def test_the_views_keep_the_memory() -> None:
    view = TensorFile(writable(safetensors.torch.save({"x": torch.full((1 << 20,), 3.0)}))).view("x")
    junk = [bytearray(4 << 20) for _ in range(4)]
    assert view.eq(3).all()
    del junk


DEEP = b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
ATTACKS: dict[str, memoryview] = {
    "nothing": writable(b""),
    "seven bytes": writable(b"\x02\0\0\0\0\0\0"),
    "no header": file_of(b""),
    "a length beyond the file": file_of({}, length=1 << 40),
    "the largest length": file_of({}, length=(1 << 64) - 1),
    "a length of minus one byte": file_of({}, length=(1 << 63) + 5),
    "a length that cuts the JSON": file_of({"x": entry([1], [0, 4])}, bytes(4), length=9),
    "no JSON": file_of(b"{hello}"),
    "a list": file_of(b"[]"),
    "space first": file_of(b" {}"),
    "bad UTF-8": file_of(b'{"\xff": 1}'),
    "deep": file_of(DEEP),
    "a number of many digits": file_of(
        b'{"x": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}'
    ),
    "a name twice": file_of(
        b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        bytes(8),
    ),
    "a field twice": file_of(b'{"x":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "overlap": file_of({"x": entry([2], [0, 8]), "y": entry([2], [4, 12])}, bytes(12)),
    "the same place": file_of({"x": entry([2], [0, 8]), "y": entry([2], [0, 8])}, bytes(8)),
    "a hole": file_of({"x": entry([1], [0, 4]), "y": entry([1], [8, 12])}, bytes(12)),
    "a hole at the start": file_of({"x": entry([1], [4, 8])}, bytes(8)),
    "bytes after": file_of({"x": entry([1], [0, 4])}, bytes(5)),
    "bytes missing": file_of({"x": entry([2], [0, 8])}, bytes(7)),
    "outside": file_of({"x": entry([1], [1 << 40, (1 << 40) + 4])}, bytes(4)),
    "negative": file_of({"x": entry([1], [-4, 0])}, bytes(4)),
    "backwards": file_of({"x": entry([1], [4, 0])}, bytes(4)),
    "a negative size": file_of({"x": entry([-1], [0, 4])}, bytes(4)),
    "two negative sizes": file_of({"x": entry([-1, -1], [0, 4])}, bytes(4)),
    "a size that wraps": file_of({"x": entry([1 << 32, 1 << 32, 1 << 62], [0, 0])}),
    "a huge empty one": file_of({"x": entry([0, 1 << 59, 1 << 59], [0, 0])}),
    "too many dimensions": file_of({"x": entry([1] * 100_000, [0, 4])}, bytes(4)),
    "more bytes than items": file_of({"x": entry([1], [0, 8])}, bytes(8)),
    "a fraction": file_of({"x": entry([1.0], [0, 4])}, bytes(4)),
    "true": file_of({"x": entry([True], [0, 4])}, bytes(4)),
    "no shape": file_of({"x": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4)),
    "a field more": file_of({"x": entry([1], [0, 4], more=1)}, bytes(4)),
    "three offsets": file_of({"x": entry([1], [0, 4, 8])}, bytes(4)),
    "offsets as text": file_of({"x": entry([1], "04")}, bytes(4)),
    "an entry that is a list": file_of({"x": []}),
    "an unknown dtype": file_of({"x": entry([1], [0, 4], "F33")}, bytes(4)),
    "a dtype of another kind": file_of({"x": entry([1], [0, 4], ["F32"])}, bytes(4)),
    "metadata that are no texts": file_of({"__metadata__": {"a": 1}}),
    "metadata of another kind": file_of({"__metadata__": []}),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_crafted_header_is_refused(attack: str) -> None:
    with pytest.raises(ValueError, match=r"not a safetensors file|no file this version reads"):
        parse_header(ATTACKS[attack])


def test_a_zip_file_of_torch_is_refused(tmp_path: Any) -> None:
    torch.save({"x": torch.ones(3)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="not a safetensors file"):
        TensorFile(writable((tmp_path / "x.pt").read_bytes()))


def test_private_copies_share_nothing_with_the_source() -> None:
    sources = [*ALL.values(), torch.arange(12.0).reshape(3, 4).t(), torch.ones(2 << 20)]
    before = [source.clone() for source in sources]
    copies = private_copies(sources)
    for source in sources:
        if source.numel():
            source.zero_()
    for copied, known in zip(copies, before, strict=True):
        assert copied.is_contiguous()
        assert (copied.dtype, copied.shape) == (known.dtype, known.shape)
        assert torch.equal(copied.reshape(-1).view(torch.uint8), known.reshape(-1).view(torch.uint8))
        assert copied.untyped_storage().nbytes() == copied.nbytes, "saving one must not save the others"
