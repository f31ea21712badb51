"""Whether training stands between two steps or in the middle of one."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch


class StepBody:
    """Entered for the body of each step. Knows whether all watched optimizers have stepped in it."""

    def __init__(self) -> None:
        self._inside = False
        self._optimizers = 0
        self._stepped: set[int] = set()

    def watch(self, objects: Iterable[Any]) -> None:
        """Of these objects, the optimizers."""
        reference = weakref.ref(self)

        def after_step(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
            body = reference()
            if body is not None:
                body._stepped.add(id(optimizer))

        for value in objects:
            if isinstance(value, torch.optim.Optimizer):
                self._optimizers += 1
                value.register_step_post_hook(after_step)

    @property
    def is_whole(self) -> bool:
        """Between two steps, or in one whose optimizers have all stepped."""
        return not self._inside or 0 < self._optimizers == len(self._stepped)

    @property
    def was_left(self) -> bool:
        """Whether the loop was left in the middle of its body, and not entered again."""
        return self._inside

    def __enter__(self) -> None:
        self._inside = True
        self._stepped.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A generator that is closed, because its loop was left or an error passed through it, stays inside.
        self._inside = kind is not None
