"""Named tensors to the bytes of a safetensors file and back. Needs torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save


def stage(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous copies in CPU memory: training may change the originals at once."""
    return {name: _copy(tensor) for name, tensor in tensors.items()}


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    if tensor.device.type == "cpu":
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.to("cpu").contiguous()


def pack(tensors: Mapping[str, torch.Tensor], aliases: Mapping[str, str]) -> bytes:
    """A safetensors file. Tied names stand in its metadata as `safetensors.torch.save_model` writes them:
    {left out: kept}.
    """
    return save(dict(tensors), metadata={"format": "pt", **aliases})


def unpack(data: bytes) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, each with memory of its own. Raises ValueError for any other
    bytes.
    """
    try:
        return load(data)
    except (SafetensorError, KeyError, RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(f"not a safetensors file: {error}") from error
