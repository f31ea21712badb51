"""torch and what Ray Train makes of it, imported without the garbage collector.

It would look through all that has been imported again and again: a fifth of the time that a worker needs to start, and
to start again. To be imported before anything that imports torch.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import ray


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection inside the block. In a process of Ray's, what is there at its end is never looked through:
    modules stay, and nothing of the user's is there yet.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
            gc.freeze()
        if was_enabled:
            gc.enable()


def import_what_training_needs() -> None:
    """What the first optimizer of a process would import, in the middle of training's start."""
    if "torch._dynamo" not in sys.modules:
        with uncollected(), suppress(ImportError):  # of a torch without it, nothing imports it
            import torch._dynamo  # noqa: F401


with uncollected():
    import ray.train.torch
