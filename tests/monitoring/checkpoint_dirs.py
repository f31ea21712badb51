"""Directories of checkpoints as training leaves them, made through the public manager; and what befalls them."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ray_tracking.checkpoint import CheckpointManager, CheckpointStore, CheckpointStrategy, create_checkpoint_manager
from ray_tracking.checkpoint.manifest import decode_manifest, encode_manifest
from ray_tracking.storage import Storage

GOOD = (10, 20, 30)
DELETABLE = {
    "step-000011": "half-written",
    "step-000012": "emptied",
    "step-000013": "emptied",
    "step-000014": "truncated",
    "step-000015": "damaged",
    ".tmp-0123456789abcdef": "unfinished file",
}
"""What is wrong in `spoil`'s directory and may go, by its path."""
LEFT_ALONE = {
    "step-000016": "renamed",
    "backup of step 20 (good!)": "renamed",
    "step-000017": "foreign",
    "checkpoint-500": "foreign",
    "epoch_3.pt": "foreign",
    "step-000018": "other version",
}


class Tied(torch.nn.Module):
    """Two names for one weight, numbered layers, and one tensor of another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(6, 4)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4, dtype=torch.bfloat16) for _ in range(3))
        self.head = torch.nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight


def save(
    directory: Path,
    steps: Iterable[int],
    *,
    losses: Iterable[float] = (),
    model: torch.nn.Module | None = None,
    **section: Any,
) -> None:
    """A plain script's checkpoints: one per step, its `loss` 1/step unless given; all of them kept."""
    given = dict(zip(steps, losses, strict=False))
    options = {"checkpoint_dir": str(directory), "save_total_limit": None, "monitor": "loss", **section}
    model = model or torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    with create_checkpoint_manager(options) as manager:
        for step in steps:
            metrics = {"loss": given.get(step, 1 / step)}
            manager.save_checkpoint(model=model, optimizer=optimizer, step=step, epoch=step // 20, metrics=metrics)


@functools.cache
def good_directory() -> Path:
    """Steps 10, 20 and 30, saved once for all tests: copy it before you change anything."""
    directory = Path(tempfile.mkdtemp(prefix="ray-tracking-test-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    save(directory / "good", GOOD)
    return directory / "good"


def save_ranks(directory: Storage, attempt: str, step: int, *, world_size: int = 2, ranks: int | None = None) -> None:
    """One step as the ranks of a run write it; by the first `ranks` of them only, if the others were killed."""
    torch.manual_seed(step)
    model = Tied()
    for rank in range(world_size if ranks is None else ranks):
        store = CheckpointStore(directory, attempt)
        strategy = CheckpointStrategy(save_total_limit=None, monitor="val/loss")
        with CheckpointManager(store, strategy, rank=rank, world_size=world_size, save_id=attempt) as manager:
            manager.save_checkpoint(
                model=model, loader={"rank": rank}, step=step, metrics={"val/loss": 1 / step}, blocking=True
            )


def spoil(directory: Path, good: Path) -> None:
    """`good`'s three checkpoints, and among them everything in `DELETABLE` and `LEFT_ALONE`."""
    shutil.copytree(good, directory)
    source = directory / "step-000020"
    copies = {name: directory / name for name in (*DELETABLE, *LEFT_ALONE)}
    for name in (
        "step-000011",
        "step-000013",
        "step-000014",
        "step-000015",
        "step-000016",
        "backup of step 20 (good!)",
        "step-000018",
    ):
        shutil.copytree(source, copies[name])
    (copies["step-000011"] / "rank-00000-of-00001.json").unlink()
    copies["step-000012"].mkdir()
    for file in copies["step-000013"].iterdir():
        file.write_bytes(b"")
    for name, step in (("step-000014", 14), ("step-000015", 15)):
        _rename(copies[name], step)
    _cut(copies["step-000014"] / "model.safetensors")
    _cut(copies["step-000015"] / "rank-00000-of-00001.json")
    for name in ("step-000017", "checkpoint-500"):
        copies[name].mkdir()
        (copies[name] / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")
    copies["epoch_3.pt"].write_bytes(b"\x80\x04K\x01.")
    (copies["step-000018"] / "rank-00000-of-00001.json").write_text('{"schema": 99, "digest": "of tomorrow"}')
    copies[".tmp-0123456789abcdef"].write_bytes(b"half")
    (directory / "notes").mkdir()
    (directory / "notes" / "read.me").write_text("nothing of ours")


def _rename(folder: Path, step: int) -> None:
    """Make it the checkpoint of another step, as if it had been saved so."""
    file = folder / "rank-00000-of-00001.json"
    file.write_bytes(encode_manifest(replace(decode_manifest(file.read_bytes()), step=step)))


def _cut(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
