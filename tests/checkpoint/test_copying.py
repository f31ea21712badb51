from __future__ import annotations

import pytest
import torch

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
