"""Copying CPU tensors in blocks that a few threads take one after another.

Torch's own copy splits each tensor among OpenMP threads and waits for all of them, tensor by tensor: on a machine that
is busy it waits a time slice for the one that has no core, hundreds of times in a state. Here a thread that has no
core takes fewer blocks. In: pairs of tensors. Holds no GIL while it copies.
"""

from __future__ import annotations

import ctypes
import functools
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch

_BLOCK = 16 << 20
_SMALL = 1 << 20
_MOST_THREADS = 4


def copy_all(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy (target, source) each. What is not two alike contiguous CPU tensors is left to torch."""
    blocks: deque[tuple[int, int, int]] = deque()
    others: list[tuple[torch.Tensor, torch.Tensor]] = []
    for target, source in pairs:
        if source.nbytes < _SMALL or not _are_alike(target, source):
            others.append((target, source))
            continue
        to, begin, size = target.data_ptr(), source.data_ptr(), source.nbytes
        blocks.extend((to + at, begin + at, min(_BLOCK, size - at)) for at in range(0, size, _BLOCK))

    def take() -> None:
        with suppress(IndexError):
            while True:
                ctypes.memmove(*blocks.popleft())

    threads = min(torch.get_num_threads(), _MOST_THREADS, len(blocks))
    helpers = [_pool().submit(take) for _ in range(threads - 1)]
    try:
        if others:
            with torch.no_grad():
                torch._foreach_copy_([target for target, _ in others], [source for _, source in others])
        take()
    finally:
        blocks.clear()  # after an error, the caller may free what these addresses point to
        for helper in helpers:
            helper.result()


def _are_alike(target: torch.Tensor, source: torch.Tensor) -> bool:
    return (
        target.dtype == source.dtype
        and target.shape == source.shape
        and target.device.type == source.device.type == "cpu"
        and target.is_contiguous()
        and source.is_contiguous()
        and not source.is_conj()
        and not source.is_neg()
    )


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_MOST_THREADS - 1, thread_name_prefix="checkpoint-copy")
