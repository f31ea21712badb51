"""A checkpoint as one file for others: plain safetensors, or a torch file that `torch.load(weights_only=True)` opens.

In: a Storage, a `CheckpointInfo`, the keys if it is encrypted. Out: a local file, there whole or not at all.

model
    The weights by name, every tensor in its own dtype. Tied weights: in safetensors stored once, the other names in
    the metadata as `safetensors.torch.save_model` writes them; in a torch file under each name, one memory.
all
    Everything by object. In a torch file a dict (`model`, `optimizer`, ..., `step`, `epoch`, `metrics`, and under
    `ranks` what other ranks than 0 have of their own). Safetensors has the same tensors by dotted names, and all that
    is no tensor as JSON (see `codec`) in the metadata under `ray_tracking`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch

from ray_tracking.checkpoint import manifest as names
from ray_tracking.checkpoint.codec import encode_state
from ray_tracking.checkpoint.keys import Keyring
from ray_tracking.checkpoint.layout import TensorSpec, file_layout
from ray_tracking.checkpoint.manifest import CheckpointInfo
from ray_tracking.checkpoint.reader import OpenCheckpoint
from ray_tracking.errors import CheckpointError, StorageError, UsageError
from ray_tracking.storage import Storage
from ray_tracking.writing import LocalWriting

SAFETENSORS, TORCH = ".safetensors", ".pt"
WHAT = ("model", "all")
_BLOCK = 4 << 20
_SPARE = 1 << 20
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""As safetensors calls them."""

Advance = Callable[[int], None]
"""Called with each number of bytes that has been written."""


@dataclass(frozen=True, slots=True)
class Exported:
    """`tied`: names left out of a safetensors file -> the name that stands for them. `left_out`: names of values in a
    model's state that are no tensors, which safetensors can't hold."""

    tensors: int
    bytes: int
    tied: Mapping[str, str]
    left_out: tuple[str, ...] = ()


def check_output(output: Path, what: str, *, force: bool) -> None:
    """Raises UsageError for a format or contents not known, a folder that is not there, and a file that is (unless
    `force`)."""
    if what not in WHAT:
        raise UsageError(f"--what: found {what!r}; allowed: {', '.join(WHAT)}.")
    if output.suffix not in (SAFETENSORS, TORCH):
        found = f"the ending {output.suffix!r}" if output.suffix else "no ending"
        raise UsageError(
            f"{output.name} has {found}; the format is chosen by it.", hint=f"Allowed: {SAFETENSORS}, {TORCH}."
        )
    if output.is_dir():
        raise UsageError(f"{output} is a folder.", hint="Name a file: -o model.safetensors.")
    if output.exists() and not force:
        raise UsageError(f"{output} is there already.", hint="Overwrite it with --force, or name another file.")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"There is no folder {output.parent} for {output.name}.", hint="Make it first.")


def size_of(info: CheckpointInfo, what: str) -> int:
    """About how many bytes the file will have."""
    return sum(
        entry.raw_size
        for manifest in info.manifests
        for stored, entry in manifest.files.items()
        if what == "all" or names.plain_name(stored).startswith("model")
    )


def export_checkpoint(
    storage: Storage,
    info: CheckpointInfo,
    output: Path,
    *,
    what: str = "model",
    keyring: Keyring | None = None,
    force: bool = False,
    advance: Advance = lambda count: None,
) -> Exported:
    """Write `output`, after every file it is made from has been checked.

    Raises UsageError like `check_output`, StorageError if there is no room, CheckpointError for what the format can't
    hold, and what `OpenCheckpoint` raises.
    """
    check_output(output, what, force=force)
    needed, free = size_of(info, what), shutil.disk_usage(output.absolute().parent).free
    if needed + _SPARE > free:
        raise StorageError(
            f"{output} needs {needed} bytes and there are {free} left on its disk.",
            hint="Make room, or choose another.",
        )
    with OpenCheckpoint(storage, info, keyring) as opened:
        if what == "model" and "model" not in opened.names():
            raise CheckpointError(
                f"The checkpoint {opened.path} holds no model, only: {', '.join(opened.names())}.",
                hint="Export everything with --what all.",
            )
        state = opened.state("model", copy=False) if what == "model" else _everything(opened)
        write = _write_torch if output.suffix == TORCH else _write_model if what == "model" else _write_all
        return write(state, output, advance)


def _everything(opened: OpenCheckpoint) -> dict[str, Any]:
    info = opened.info
    ranks = {
        manifest.rank: {name: opened.state(name, manifest.rank, copy=False) for name in manifest.objects}
        for manifest in info.manifests
        if manifest.rank > 0 and manifest.objects
    }
    facts = {"step": info.step, "epoch": info.epoch, "metrics": dict(info.metrics), "world_size": info.world_size}
    return {**facts, **({"ranks": ranks} if ranks else {}), **opened.states(copy=False)}


# -- safetensors ---------------------------------------------------------------------------------------


def _write_model(state: Any, output: Path, advance: Advance) -> Exported:
    found: dict[str, torch.Tensor] = {}
    left_out: list[str] = []
    _flatten(state, "", found, left_out)
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in found.items():
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        kept = first.setdefault(place, name) if tensor.numel() else name
        if kept == name:
            tensors[name] = tensor
        else:
            tied[name] = kept
    size = _write_safetensors(tensors, {"format": "pt", **tied}, output, advance)
    return Exported(len(tensors), size, tied, tuple(left_out))


def _write_all(state: Any, output: Path, advance: Advance) -> Exported:
    encoded = encode_state(state)
    rest = json.dumps(encoded.tree, separators=(",", ":"), allow_nan=False)
    metadata = {"format": "pt", **encoded.aliases, "ray_tracking": rest}
    size = _write_safetensors(encoded.tensors, metadata, output, advance)
    return Exported(len(encoded.tensors), size, encoded.aliases)


def _flatten(value: Any, path: str, tensors: dict[str, torch.Tensor], left_out: list[str]) -> None:
    """Tensors by dotted path; whatever else is in there by its path alone."""
    if isinstance(value, torch.Tensor):
        tensors[path] = value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _flatten(item, f"{path}.{key}" if path else str(key), tensors, left_out)
    else:
        left_out.append(path or "the state itself")


def _write_safetensors(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], output: Path, advance: Advance
) -> int:
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"The tensor {name} is {tensor.dtype}, which safetensors can't hold.", hint=f"Use a {TORCH} file."
            )
    specs = {
        name: TensorSpec(_DTYPES[tensor.dtype], tuple(tensor.shape), tensor.element_size(), tensor.nbytes)
        for name, tensor in tensors.items()
    }
    layout = file_layout(specs, metadata)
    with LocalWriting(os.fspath(output.absolute()), _failure, layout.size) as writing:
        writing.write(layout.header)
        for name in sorted(layout.offsets, key=lambda each: layout.offsets[each]):
            if tensors[name].numel():
                _write_blocks(writing, tensors[name], advance)
    return layout.size


def _write_blocks(writing: LocalWriting, tensor: torch.Tensor, advance: Advance) -> None:
    data: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    for begin in range(0, len(data), _BLOCK):
        block = data[begin : begin + _BLOCK]
        writing.write(block)
        advance(len(block))


# -- torch ---------------------------------------------------------------------------------------------


def _write_torch(state: Any, output: Path, advance: Advance) -> Exported:
    counted: set[int] = set()
    plain = _plain(state, counted)
    with LocalWriting(os.fspath(output.absolute()), _failure, None) as writing:
        stream = _Stream(writing, advance)
        try:
            torch.save(plain, cast(IO[bytes], stream))
        except RuntimeError:
            if stream.error is not None:
                raise stream.error from None
            raise
    return Exported(len(counted), stream.size, {})


class _Stream:
    """What `torch.save` writes to."""

    def __init__(self, writing: LocalWriting, advance: Advance) -> None:
        self.size = 0
        self.error: BaseException | None = None
        """The first; torch closes its archive all the same, and fails at that with another."""
        self._writing = writing
        self._advance = advance

    def write(self, data: Any) -> int:
        block = memoryview(data).cast("B")
        try:
            self._writing.write(block)
        except BaseException as error:
            self.error = self.error or error
            raise
        self.size += len(block)
        self._advance(len(block))
        return len(block)

    def flush(self) -> None:
        """Nothing is held back here."""


def _plain(value: Any, counted: set[int]) -> Any:
    """With nothing in it that `weights_only=True` refuses: arrays as tensors, sets and queues as lists, bytes as a
    tensor of them."""
    if isinstance(value, torch.Tensor):
        counted.add(id(value))
        return value
    if isinstance(value, np.ndarray):
        return _from_array(value, counted)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, OrderedDict):
        ordered = OrderedDict((key, _plain(item, counted)) for key, item in value.items())
        if hasattr(value, "_metadata"):  # the versions of a module's parts, which load_state_dict looks at
            ordered._metadata = _plain(value._metadata, counted)  # type: ignore[attr-defined]
        return ordered
    if isinstance(value, Mapping):
        return {_plain(key, counted): _plain(item, counted) for key, item in value.items()}
    if type(value) is tuple:
        return tuple(_plain(item, counted) for item in value)
    if isinstance(value, (list, deque, set, frozenset)):
        return [_plain(item, counted) for item in value]
    if isinstance(value, (bytes, bytearray)):
        return torch.frombuffer(bytearray(value), dtype=torch.uint8) if value else torch.empty(0, dtype=torch.uint8)
    return value


def _from_array(value: np.ndarray[Any, Any], counted: set[int]) -> Any:
    try:
        tensor = torch.from_numpy(value)
    except TypeError:  # texts, dates: what torch has no dtype for
        return value.tolist()
    counted.add(id(tensor))
    return tensor


def _failure(verb: str, path: str, error: OSError) -> StorageError:
    return StorageError(f"Can't {verb} {path}: {error}", hint="Choose another place with -o.")
