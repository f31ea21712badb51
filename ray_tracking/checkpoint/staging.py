"""Copying a described state into memory that another process can read, in the bytes of its files.

In: a `Description` of live tensors. Out: a `Snapshot`. Runs on the training thread, which waits for the copy alone:
what does not change from save to save (views, layouts) is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ray_tracking.checkpoint.copying import copy_all
from ray_tracking.checkpoint.manifest import state_file
from ray_tracking.checkpoint.memory import PAGE, address_of
from ray_tracking.checkpoint.state import Description, Snapshot


class Stager:
    """Copies descriptions into buffers; keeps the views of each buffer from one save to the next."""

    def __init__(self) -> None:
        self._views: dict[int, tuple[Any, list[torch.Tensor]]] = {}
        self._pinned: set[int] = set()
        self._stream: Any = None

    @staticmethod
    def size_of(description: Description) -> int:
        """Bytes that `stage` needs: each file begins at a page."""
        sizes = [file.layout.size for file in description.files.values()] + [len(description.document)]
        return sum(map(_pages, sizes))

    def stage(self, description: Description, memory: memoryview) -> Snapshot:
        """Copy everything into `memory` (writable, at least `size_of` bytes); training may go on when it returns.

        Copies from CUDA run on a stream of their own that the current stream waits for: the caller does not, but must
        call `synchronize` before it reads the memory.
        """
        files, begin = {}, 0
        for name, file in description.files.items():
            files[name] = memory[begin : begin + file.layout.size]
            files[name][: len(file.layout.header)] = file.layout.header
            begin += _pages(file.layout.size)
        self._copy(description, files, memory)
        document = description.document
        memory[begin : begin + len(document)] = document
        files[state_file(description.manifest.rank)] = memory[begin : begin + len(document)]
        return Snapshot(description.manifest, files)

    def forget(self, memory: memoryview) -> None:
        """Let go of a buffer that is not used again."""
        address = address_of(memory)
        self._views.pop(address, None)
        if address in self._pinned:
            self._pinned.remove(address)
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))  # type: ignore[no-untyped-call]

    def synchronize(self) -> None:
        """Wait until copies from CUDA devices have arrived; nothing to wait for otherwise."""
        if self._stream is not None:
            self._stream.synchronize()

    def _copy(self, description: Description, files: Mapping[str, memoryview], memory: memoryview) -> None:
        pairs = [
            (name, file.layout.offsets[key], tensor)
            for name, file in description.files.items()
            for key, tensor in file.tensors.items()
            if tensor.numel()
        ]
        if not pairs:
            return
        address = address_of(memory)
        layouts = [file.layout.header for file in description.files.values()]
        known, targets = self._views.get(address, (None, []))
        if known != layouts:
            targets = [_view(files[name], offset, tensor) for name, offset, tensor in pairs]
            self._views[address] = layouts, targets
        sources = [tensor for _, _, tensor in pairs]
        with torch.no_grad():
            if any(source.is_cuda for source in sources):
                self._pin(address, len(memory))
                self._copy_from_devices(targets, sources)
            else:
                copy_all(zip(targets, sources, strict=True))

    def _pin(self, address: int, size: int) -> None:
        """Lock the pages, which copies from CUDA devices need to run beside the training."""
        if address not in self._pinned:
            register = torch.cuda.cudart().cudaHostRegister  # type: ignore[no-untyped-call]
            torch.cuda.check_error(register(address, size, 0))
            self._pinned.add(address)

    def _copy_from_devices(self, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        device = next(source.device for source in sources if source.is_cuda)
        current = torch.cuda.current_stream(device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
                if source.is_cuda:
                    source.record_stream(self._stream)
        current.wait_stream(self._stream)  # the next optimizer step must not change what is being copied


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _view(memory: memoryview, offset: int, like: torch.Tensor) -> torch.Tensor:
    flat = torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=offset)
    return flat.view(like.shape)
