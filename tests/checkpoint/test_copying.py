from __future__ import annotations

import ctypes
import threading
import time

import pytest
import torch

from ray_tracking.checkpoint import copying
from ray_tracking.checkpoint.copying import copy_all


@pytest.mark.parametrize("threads", [1, 2])
def test_every_kind_of_pair_is_copied(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sources = [
            torch.rand(9 << 20),  # several blocks, the last one not full
            torch.rand(3),
            torch.rand(1200, 1000).T,
            torch.arange(1 << 20),
            torch.rand(1 << 19, dtype=torch.float64),
            torch.empty(0),
            torch.tensor(4.0),
        ]
        targets = [torch.zeros(source.shape, dtype=source.dtype) for source in sources]
        targets[4] = targets[4].float()
        copy_all(zip(targets, sources, strict=True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(target, source.to(target.dtype)) for target, source in zip(targets, sources, strict=True))


def test_what_a_thread_raises_is_raised() -> None:
    with pytest.raises(RuntimeError):
        copy_all([(torch.zeros(2), torch.zeros(3))])


def test_no_thread_copies_on_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller may free the memory then."""
    copied = []
    raised = threading.Event()

    class Slow:
        @staticmethod
        def memmove(*block: int) -> None:
            if threading.current_thread() is threading.main_thread():
                raised.set()
                raise KeyboardInterrupt
            raised.wait(60)
            time.sleep(0.2)
            ctypes.memmove(*block)
            copied.append(block)

    monkeypatch.setattr(copying, "ctypes", Slow)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    source = torch.rand(64 << 20)
    with pytest.raises(KeyboardInterrupt):
        copy_all([(torch.empty_like(source), source)])
    before = len(copied)
    time.sleep(0.5)
    assert len(copied) == before < 16
