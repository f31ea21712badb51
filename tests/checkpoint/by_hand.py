"""Checkpoints written by hand, in the layout on storage but not by the package's writer: what its reader is given."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ray_tracking.checkpoint import manifest as names
from ray_tracking.checkpoint.codec import encode_state
from ray_tracking.checkpoint.keys import Keyring
from ray_tracking.checkpoint.manifest import CheckpointInfo, FileEntry, Manifest
from ray_tracking.checkpoint.sealing import Sealing, seal

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offset, size) of a part of a tensor."""


def write(
    root: Path,
    objects: Mapping[str, Any],
    *,
    own: Mapping[str, Sequence[Any]] | None = None,
    cuts: Mapping[str, Sequence[Box | None]] | None = None,
    step: int = 5,
    world_size: int = 1,
    compression: Any = None,
    keyring: Keyring | None = None,
) -> CheckpointInfo:
    """One complete checkpoint of `objects` (their states) in `root`; whole tensors are dealt to the ranks in turn.

    `own`: name -> the state of each rank. `cuts`: a tensor's name -> the part that each rank stores of it.
    """
    cuts = cuts or {}
    model = {name: state for name, state in objects.items() if name == "model"}
    rest = {name: state for name, state in objects.items() if name != "model"}
    families = {"model": encode_state(model.get("model")), "state": encode_state(rest)}
    trees: dict[str, Any] = {name: {"file": "state", "tree": tree} for name, tree in families["state"].tree.items()}
    trees.update({name: {"file": "model", "tree": families["model"].tree} for name in model})
    whole = {name: tensor for encoded in families.values() for name, tensor in encoded.tensors.items()}
    _mark_sharded([entry["tree"] for entry in trees.values()], {name: whole[name] for name in cuts})
    manifests = []
    for rank in range(world_size):
        private = encode_state({name: states[rank] for name, states in (own or {}).items()}, f"rank-{rank:05d}")
        entries = {name: {"file": "state", "tree": tree} for name, tree in private.tree.items()}
        tensors: dict[str, dict[str, torch.Tensor]] = {"model": {}, "state": dict(private.tensors)}
        pieces = {}
        for family, encoded in families.items():
            for number, (name, tensor) in enumerate(sorted(encoded.tensors.items())):
                box = cuts[name][rank] if name in cuts else None
                if box is not None:
                    pieces[name] = list(box[0])
                    tensors[family][name] = part(tensor, box)
                elif name not in cuts and number % world_size == rank:
                    tensors[family][name] = tensor.contiguous()
        document = {"objects": {**entries, **(trees if rank == 0 else {})}, "pieces": pieces}
        files = {names.state_file(rank): json.dumps(document).encode()}
        for family, name in (("model", names.model_file(rank, world_size)), ("state", names.tensor_file(rank))):
            if tensors[family]:
                tied = {left: kept for left, kept in families[family].aliases.items() if kept in tensors[family]}
                files[name] = safetensors.torch.save(
                    {key: tensor.clone() for key, tensor in tensors[family].items()}, {"format": "pt", **tied}
                )
        manifests.append(_store(root, files, step, rank, world_size, compression, keyring))
    return names.combine(names.step_folder(step), 0, tuple(manifests), pinned=False)


def part(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    for dimension, (begin, size) in enumerate(zip(*box, strict=True)):
        tensor = tensor.narrow(dimension, begin, size)
    return tensor.contiguous()


def replace_file(root: Path, info: CheckpointInfo, file: str, data: bytes) -> CheckpointInfo:
    """Put other bytes under a file's name and let the manifest vouch for them."""
    manifests = []
    for manifest in info.manifests:
        if file in manifest.files:
            entry = FileEntry(len(data), names.digest(data), len(data))
            manifest = replace(manifest, files={**manifest.files, file: entry})
            (root / info.folder / file).write_bytes(data)
            own = names.rank_file(manifest.rank, manifest.world_size)
            (root / info.folder / own).write_bytes(names.encode_manifest(manifest))
        manifests.append(manifest)
    return replace(info, manifests=tuple(manifests))


def _store(
    root: Path,
    files: Mapping[str, bytes],
    step: int,
    rank: int,
    world_size: int,
    compression: Any,
    keyring: Keyring | None,
) -> Manifest:
    folder = root / names.step_folder(step)
    folder.mkdir(parents=True, exist_ok=True)
    key = None if keyring is None else keyring.new_data_key()
    sealing = Sealing(compression, key)
    entries = {}
    for name, data in files.items():
        stored = b"".join(bytes(block) for block in seal(memoryview(data), sealing, f"save/{step}/{rank}/{name}"))
        (folder / (name + sealing.suffix)).write_bytes(stored)
        entries[name + sealing.suffix] = FileEntry(len(stored), names.digest(stored), len(data))
    manifest = Manifest(
        step=step,
        epoch=2,
        rank=rank,
        world_size=world_size,
        sequence=step,
        created=1.0,
        metrics={"val_loss": 0.5},
        objects=(),
        files=entries,
        save_id="save",
        plan="plan",
        compression=compression,
        encryption=None if key is None else {"cipher": "AES-256-GCM-STREAM", "chunk": 4 << 20, "keys": key.wrapped},
    )
    if key is not None:
        mac = key.mac(names.authenticated_bytes(manifest))
        manifest = replace(manifest, encryption={**(manifest.encryption or {}), "mac": mac})
    (folder / names.rank_file(rank, world_size)).write_bytes(names.encode_manifest(manifest))
    return manifest


def _mark_sharded(tree: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    if isinstance(tree, list):
        for item in tree:
            _mark_sharded(item, tensors)
    elif isinstance(tree, dict):
        if tree.get("$") == "tensor" and tree["name"] in tensors:
            tensor = tensors[tree["name"]]
            tree.update({"$": "sharded", "shape": list(tensor.shape), "dtype": str(tensor.dtype).split(".")[1]})
        else:
            for item in tree.values():
                _mark_sharded(item, tensors)
