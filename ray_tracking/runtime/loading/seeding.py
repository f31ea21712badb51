"""Random numbers of a batch that depend on where it stands in its epoch, and on nothing that was drawn before it.

Datasets and collate functions draw from the global generators of Python, NumPy and torch. Here these are lent to a
piece of loading and given back, so that neither the training loop's numbers nor the loader's depend on the other.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.random import mtrand


def seed_for(*parts: int | str) -> int:
    """A seed from what it stands for (seed, epoch, position, ...), in [0, 2**63)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_generators(seed: int) -> None:
    """Seed the global CPU generators. A CUDA generator stays as it is: it is the training loop's."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


class OwnRandom:
    """Global generators of one piece of loading inside `with`, which puts back the others at its end.

    With `goes_on` they go on where the last `with` ended; without, they have to be seeded first. About 20 microseconds
    per use. NumPy's generator is exchanged, since copying it would add seventy; the half of a pair of Gaussian numbers
    that NumPy keeps for the next call is lost thereby, after every batch alike.
    """

    def __init__(self, *, goes_on: bool) -> None:
        self._goes_on = goes_on
        self._numpy = np.random.MT19937(0)
        self._inside: tuple[Any, torch.Tensor] | None = None
        self._outside: tuple[Any, Any, torch.Tensor] | None = None

    def __enter__(self) -> None:
        self._outside = (random.getstate(), mtrand.get_bit_generator(), torch.default_generator.get_state())
        mtrand.set_bit_generator(self._numpy)
        if self._inside is not None:
            random.setstate(self._inside[0])
            torch.default_generator.set_state(self._inside[1])

    def __exit__(self, *_: object) -> None:
        assert self._outside is not None
        if self._goes_on:
            self._inside = (random.getstate(), torch.default_generator.get_state())
        random.setstate(self._outside[0])
        mtrand.set_bit_generator(self._outside[1])
        torch.default_generator.set_state(self._outside[2])

    def drop_half(self) -> None:
        """Inside: forget NumPy's kept half now, where it does not depend on how the work was cut into `with`s."""
        mtrand.set_bit_generator(self._numpy)


@contextmanager
def forked(seed: int) -> Iterator[None]:
    """The global generators seeded inside, and afterwards exactly as they were."""
    kept = np.random.get_state(legacy=False)
    try:
        with OwnRandom(goes_on=False):
            seed_generators(seed)
            yield
    finally:
        np.random.set_state(kept)
