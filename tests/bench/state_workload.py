"""What the benchmarks of checkpoints save and restore, the GPT example's state, and the copy they are compared with."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from ray_tracking.examples.gpt_model import GPT, build, loss_of

SIZE = "large"
"""520 MB. The short form has fewer rounds, not a smaller state: what a save costs besides the copy does not shrink."""
_WINDOWS, _TOKENS = 2, 65
_TRIALS = 5
_BLOCK = 8 << 20


@dataclass(frozen=True, slots=True)
class Workload:
    """A model and an optimizer that has stepped."""

    model: GPT
    optimizer: torch.optim.Optimizer

    @classmethod
    def build(cls, size: str, seed: int = 0) -> Workload:
        return cls(*build(size, seed=seed))

    @property
    def objects(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer}

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Every tensor of the state, live: weights, moments, Adam's step counts."""
        moments = [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        return [parameter.detach() for parameter in self.model.parameters()] + moments

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def state(self) -> dict[str, Any]:
        """As people hand it to torch.save and dcp.save."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def flat(self) -> dict[str, torch.Tensor]:
        """As safetensors wants it: tensors only, by name."""
        moments = self.optimizer.state_dict()["state"]
        return {
            **{f"model.{name}": tensor for name, tensor in self.model.state_dict().items()},
            **{f"optimizer.{i}.{key}": tensor for i, state in moments.items() for key, tensor in state.items()},
        }

    def step(self) -> None:
        """One step of training on random tokens: all of the state changes."""
        tokens = torch.randint(len(self.model.tokens.weight), (_WINDOWS, _TOKENS))
        loss_of(self.model, tokens).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()


class Memcpy:
    """The base of the ratios: the bytes of some tensors copied into memory that was provided and touched before.

    It is the fastest of the `ways` to do that in this process with torch's number of threads, tried when it is made.
    """

    def __init__(self, sources: Sequence[torch.Tensor]) -> None:
        self.sources = [source for source in sources if source.is_contiguous()]
        if len(self.sources) < len(sources):
            raise ValueError("memmove copies contiguous tensors only")
        self.targets = [torch.empty_like(source).fill_(1) for source in self.sources]
        self._helpers = torch.get_num_threads() - 1
        self._pool = ThreadPoolExecutor(max(self._helpers, 1), thread_name_prefix="memcpy")
        self._blocks = [block for pair in zip(self.targets, self.sources, strict=True) for block in _blocks(*pair)]
        self.ways: Mapping[str, Callable[[], None]] = MappingProxyType(
            {"_foreach_copy_": self._all_at_once, "copy_": self._one_by_one, "memmove": self._memmove}
        )
        times = {name: [timed(copy) for _ in range(_TRIALS)] for name, copy in self.ways.items()}
        self.way = fastest(times)

    def __call__(self) -> None:
        self.ways[self.way]()

    def _all_at_once(self) -> None:
        torch._foreach_copy_(self.targets, self.sources)

    def _one_by_one(self) -> None:
        for target, source in zip(self.targets, self.sources, strict=True):
            target.copy_(source)

    def _memmove(self) -> None:
        """Each thread takes the next block until none is left."""
        waiting = deque(self._blocks)

        def move() -> None:
            with suppress(IndexError):
                while True:
                    ctypes.memmove(*waiting.popleft())

        helping = [self._pool.submit(move) for _ in range(self._helpers)]
        move()
        for helper in helping:
            helper.result()


def _blocks(target: torch.Tensor, source: torch.Tensor) -> list[tuple[int, int, int]]:
    """(to, from, bytes)."""
    to, begin, size = target.data_ptr(), source.data_ptr(), source.nbytes
    return [(to + at, begin + at, min(_BLOCK, size - at)) for at in range(0, size, _BLOCK)]


def fastest(times: Mapping[str, Sequence[float]]) -> str:
    """The name with the least median."""
    return min(times, key=lambda name: statistics.median(times[name]))


def timed(act: Callable[[], object]) -> float:
    """Seconds."""
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin


def megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"
