"""The other sides of the benchmarks of checkpoints: how people save and load with PyTorch's and safetensors' own tools.

Each as its documentation shows it, with its own defaults. Each is given the state dicts themselves, which costs it the
least: `dcp.load` then fills the live tensors in place.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from tests.bench.state_workload import Workload

TORCH, DURABLE = "torch.save", "torch.save + fsync"
SAFETENSORS, DCP = "safetensors save_file", "dcp.save"
ASYNC, ASYNC_KEPT = "dcp.async_save", "dcp.async_save, buffers kept"

Wait = Callable[[], object]
Save = Callable[[Workload, Path], Wait]

# What these say about running without a process group and about their future is not for the reader of a table.
warnings.filterwarnings("ignore", module=r"torch\.distributed")


def _nothing() -> None:
    """Nothing is left to wait for."""


def _torch_save(workload: Workload, path: Path) -> Wait:
    torch.save(workload.state(), path)
    return _nothing


def _torch_save_durable(workload: Workload, path: Path) -> Wait:
    """As durable as dcp.save and ours leave it."""
    with path.open("wb") as file:
        torch.save(workload.state(), file)
        file.flush()
        os.fsync(file.fileno())
    return _nothing


def _save_file(workload: Workload, path: Path) -> Wait:
    save_file(workload.flat(), path)
    return _nothing


def _dcp_save(workload: Workload, path: Path) -> Wait:
    save(workload.state(), checkpoint_id=path, no_dist=True)
    return _nothing


def _dcp_async_save(workload: Workload, path: Path, stager: DefaultStager | None = None) -> Wait:
    answer: Any = async_save(workload.state(), checkpoint_id=path, no_dist=True, async_stager=stager)
    return getattr(answer, "upload_completion", answer).result  # type: ignore[no-any-return]


def _with_kept_buffers() -> Save:
    """Its fastest way without an accelerator: copies into shared memory that is kept from save to save."""
    stagers: list[DefaultStager] = []

    def save_kept(workload: Workload, path: Path) -> Wait:
        if not stagers:
            options = StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=True,
                use_async_staging=False,
                use_non_blocking_copy=False,
            )
            stagers.append(DefaultStager(options))
        return _dcp_async_save(workload, path, stagers[0])

    return save_kept


SAVERS: Mapping[str, Save] = MappingProxyType(
    {
        TORCH: _torch_save,
        DURABLE: _torch_save_durable,
        SAFETENSORS: _save_file,
        DCP: _dcp_save,
        ASYNC: _dcp_async_save,
        ASYNC_KEPT: _with_kept_buffers(),
    }
)
"""By name: saves into a file or folder that is not there yet; what it returns waits for what is still being written."""


def clear(path: Path) -> None:
    """Make what a side wrote durable and delete it: nothing of it is left to be written during the next side's time."""
    for file in [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def torch_load(workload: Workload, path: Path) -> None:
    state = torch.load(path)
    workload.model.load_state_dict(state["model"])
    workload.optimizer.load_state_dict(state["optimizer"])


def dcp_load(workload: Workload, path: Path) -> None:
    """Where the optimizer has stepped."""
    state = workload.state()
    load(state, checkpoint_id=path, no_dist=True)
    workload.model.load_state_dict(state["model"])  # its documentation: "Users must call load_state_dict"
    workload.optimizer.load_state_dict(state["optimizer"])


def dcp_save_by_name(workload: Workload, path: Path) -> None:
    """For `dcp_load_anew`."""
    model, optimizer = get_state_dict(workload.model, workload.optimizer)
    save({"model": model, "optimizer": optimizer}, checkpoint_id=path, no_dist=True)


def dcp_load_anew(workload: Workload, path: Path) -> None:
    """Where the optimizer is new: as PyTorch's own recipe has it, since there is nothing yet to load into."""
    model, optimizer = get_state_dict(workload.model, workload.optimizer)
    load({"model": model, "optimizer": optimizer}, checkpoint_id=path, no_dist=True)
    set_state_dict(workload.model, workload.optimizer, model_state_dict=model, optim_state_dict=optimizer)
