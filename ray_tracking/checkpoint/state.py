"""Taking the state of live objects into memory, and putting a loaded state back into them.

In: objects with `state_dict()`/`load_state_dict()` or plain state. Out: `Snapshot`, copies that training
can't change any more.
No I/O. Runs on the training thread; a snapshot may then be written from any thread.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ray_tracking.checkpoint.codec import Encoded, encode_state
from ray_tracking.checkpoint.distributed_state import plain_name, sharded_state
from ray_tracking.checkpoint.layout import FileLayout, TensorSpec, file_layout, spread
from ray_tracking.checkpoint.manifest import Manifest, digest, model_file, tensor_file
from ray_tracking.checkpoint.rng import capture_rng
from ray_tracking.checkpoint.sharding import Piece
from ray_tracking.errors import MetricError, UsageError
from ray_tracking.log import get_logger

PER_RANK = frozenset({"loader"})
"""Objects whose state is each rank's own, as is that of every object with a true `rank_own_state`; all others are
replicated (or sharded) and written once."""
RNG = "rng"
"""The name the random states are stored under; no object may have it."""
_MODEL, _STATE = "model", "state"
_SMALL = 1 << 20
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

_log = get_logger()


@dataclass(frozen=True, slots=True)
class TensorFile:
    """The tensors of one safetensors file, still the live ones, and where each goes in it."""

    tensors: Mapping[str, torch.Tensor]
    layout: FileLayout


@dataclass(frozen=True, slots=True)
class Description:
    """One rank's part of a checkpoint before anything is copied: what stands in it and where.

    `manifest` lacks its files; `document` is the state file's JSON.
    """

    manifest: Manifest
    document: bytes
    files: Mapping[str, TensorFile]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return len(self.document) + sum(file.layout.size for file in self.files.values())


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One rank's part of a checkpoint in memory that training can't change: the bytes of each file by plain name."""

    manifest: Manifest
    files: Mapping[str, memoryview] = field(repr=False)

    @property
    def step(self) -> int:
        return self.manifest.step


def unwrap(model: Any) -> Any:
    """The module inside DistributedDataParallel, DataParallel and torch.compile wrappers."""
    while True:
        if isinstance(model, (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)):
            model = model.module
        elif type(model).__name__ == "OptimizedModule" and hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def describe(
    objects: Mapping[str, Any],
    *,
    step: int,
    epoch: int = 0,
    metrics: Mapping[str, Any] | None = None,
    rank: int = 0,
    world_size: int = 1,
    include_rng: bool = True,
    sequence: int | None = None,
    save_id: str = "",
    reason: str = "",
    improved: bool = False,
) -> Description:
    """What this rank has to store of `objects` ({"model": ..., "optimizer": ..., "loader": ...}; None is left out).

    Call it on every rank with the same objects. The random states and `PER_RANK` are each rank's own; of everything
    else the ranks store a share each, which they know without a message. `sequence` orders checkpoints (the step,
    unless given); `save_id` must be the same on every rank of one save.
    Raises CheckpointError naming the path of a value that can't be stored, MetricError for a metric that is no number.
    """
    if not 0 <= rank < world_size or step < 0:
        raise UsageError(f"A checkpoint of step {step} by rank {rank} of {world_size} can't be: count ranks from 0.")
    if RNG in objects:
        raise UsageError(f"An object can't be saved as {RNG!r}: the random states have that name.")
    states = {name: state_of(name, value, objects) for name, value in objects.items() if value is not None}
    own = {name: state for name, state in states.items() if _is_rank_own(name, objects[name])}
    if include_rng:
        own[RNG] = capture_rng()
    model = {_MODEL: states[_MODEL]} if _MODEL in states else {}
    rest = {name: state for name, state in states.items() if name not in own and name != _MODEL}
    families = {_MODEL: encode_state(model.get(_MODEL)), _STATE: encode_state(rest)}
    private = encode_state(own, f"rank-{rank:05d}")

    trees: dict[str, dict[str, Any]] = {}
    if rank == 0:
        trees.update({name: {"file": _MODEL, "tree": families[_MODEL].tree} for name in model})
        trees.update({name: {"file": _STATE, "tree": tree} for name, tree in families[_STATE].tree.items()})
    trees.update({name: {"file": _STATE, "tree": tree} for name, tree in private.tree.items()})
    pieces = {
        name: list(piece.offset)
        for encoded in families.values()
        for name, piece in encoded.pieces.items()
        if _is_stored(piece)
    }
    mine = _share(families, rank, world_size, _buffers(objects))
    mine[_STATE].update(private.tensors)
    files = {}
    for family, plain in ((_MODEL, model_file(rank, world_size)), (_STATE, tensor_file(rank))):
        if mine[family]:
            files[plain] = _tensor_file(mine[family], families[family].aliases)
    document = {"objects": trees, "pieces": pieces}
    manifest = Manifest(
        step=step,
        epoch=epoch,
        rank=rank,
        world_size=world_size,
        sequence=step if sequence is None else sequence,
        created=0.0,
        metrics=_numbers(metrics or {}),
        objects=tuple(sorted(trees)),
        files={},
        save_id=save_id,
        plan=_plan(families),
        reason=reason,
        improved=improved,
    )
    text = json.dumps(document, separators=(",", ":"), allow_nan=False).encode("ascii")
    return Description(manifest, text, files)


def capture(objects: Mapping[str, Any], **options: Any) -> Snapshot:
    """`describe` (same arguments), and a copy of everything into fresh memory. For saves that need not be fast."""
    from ray_tracking.checkpoint.staging import Stager

    description = describe(objects, **options)
    return Stager().stage(description, memoryview(bytearray(Stager.size_of(description))))


def _is_rank_own(name: str, value: Any) -> bool:
    return name in PER_RANK or bool(getattr(value, "rank_own_state", False))


def _share(
    families: Mapping[str, Encoded], rank: int, world_size: int, buffers: frozenset[str]
) -> dict[str, dict[str, torch.Tensor]]:
    """By family of files: the tensors that this rank stores.

    Rank 0 stores buffers, which are its own where the ranks have not exchanged them since the last forward pass; and of
    sharded states what is small and whole, since every rank would have to read the files of all ranks for it.
    """
    sizes, owners = {}, {}
    for family, encoded in families.items():
        for name, tensor in encoded.tensors.items():
            if name in encoded.pieces:
                continue
            if f"{family} {name}" in buffers or (encoded.pieces and tensor.nbytes <= _SMALL):
                owners[f"{family} {name}"] = 0
            else:
                sizes[f"{family} {name}"] = tensor.nbytes
    owners.update(spread(sizes, world_size))
    return {
        family: {
            name: tensor
            for name, tensor in encoded.tensors.items()
            if (_is_stored(encoded.pieces[name]) if name in encoded.pieces else owners[f"{family} {name}"] == rank)
        }
        for family, encoded in families.items()
    }


def _buffers(objects: Mapping[str, Any]) -> frozenset[str]:
    """Of all modules, the names of their buffers among the tensors of a family."""
    found = []
    for name, value in objects.items():
        module = unwrap(value)
        if isinstance(module, torch.nn.Module) and not _is_rank_own(name, value):
            prefix = f"{_MODEL} " if name == _MODEL else f"{_STATE} {name}."
            found += [prefix + each for key, _ in module.named_buffers() for each in (key, plain_name(key))]
    return frozenset(found)


def _is_stored(piece: Piece) -> bool:
    return piece.stored and piece.local.numel() > 0


def _tensor_file(tensors: Mapping[str, torch.Tensor], aliases: Mapping[str, str]) -> TensorFile:
    specs = {
        name: TensorSpec(_DTYPES[tensor.dtype], tuple(tensor.shape), tensor.element_size(), tensor.nbytes)
        for name, tensor in tensors.items()
    }
    tied = {left_out: kept for left_out, kept in aliases.items() if kept in tensors}
    return TensorFile(tensors, file_layout(specs, {"format": "pt", **tied}))


def _plan(families: Mapping[str, Encoded]) -> str:
    """A digest of what the ranks must agree on: names, dtypes and whole shapes of all that is stored once."""
    lines = []
    for family, encoded in families.items():
        for name, tensor in sorted(encoded.tensors.items()):
            shape = encoded.pieces[name].whole if name in encoded.pieces else tuple(tensor.shape)
            lines.append(f"{family} {name} {tensor.dtype} {shape}")
    return digest("\n".join(lines).encode())


def state_of(name: str, value: Any, objects: Mapping[str, Any]) -> Any:
    """The state of one of `objects`: of a model and its optimizer sharded by FSDP2, by parameter names."""
    if name.startswith("$") or not name:
        raise UsageError(f"An object can't be saved under the name {name!r}.", hint="Use a plain word.")
    value = unwrap(value)
    sharded = sharded_state(name, value, objects)
    if sharded is not None:
        return sharded
    return value.state_dict() if hasattr(value, "state_dict") else value


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    numbers = {}
    for key, value in metrics.items():
        try:
            numbers[str(key)] = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise MetricError(
                f"The checkpoint's metric {key!r} is no number: {value!r:.100}",
                hint="Give one number per metric.",
            ) from error
    return numbers
