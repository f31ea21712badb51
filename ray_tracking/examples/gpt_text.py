"""Real text that every Python ships, as tokens: the topics of `help()`, cut into training and validation text.

In: nothing, or text. Out: text, token ids, windows of them. The text differs a little from one version of Python to
the next; the vocabulary's size does not.
"""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import torch
from torch.utils.data import Dataset

VOCABULARY = 1024
"""At equal computing time validation comes to 2.2 bits per byte of text, with 512 to 2.4, with plain bytes to 3.2."""

_STRETCHES, _EACH = 100, 10
"""The text is cut into 100 stretches, every tenth of them for validation: both parts tell of everything."""
_GOLDEN = 0.6180339887498949
"""Multiples of it, without their whole part, spread evenly from 0 to 1 however many there are."""


def corpus() -> tuple[str, str]:
    """Training and validation text. Each paragraph stands there once: one in five of the topics' is a repetition,
    and validation on text that was trained on would show nothing."""
    paragraphs: dict[str, str] = {}
    topics = pydoc_data.topics.topics
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            paragraphs.setdefault(" ".join(paragraph.split()), paragraph)
    text = "\n\n".join(paragraphs.values())
    cuts = [len(text) * part // _STRETCHES for part in range(_STRETCHES + 1)]
    stretches = [text[begin:end] for begin, end in pairwise(cuts)]
    held_out = stretches[_EACH - 1 :: _EACH]
    del stretches[_EACH - 1 :: _EACH]
    return "".join(stretches), "".join(held_out)


class Tokenizer:
    """Byte-pair encoding: the first 256 tokens are the bytes, each further one a pair of earlier tokens.

    Any text can be encoded, and decodes to itself.
    """

    def __init__(self, pairs: Iterable[tuple[int, int]]) -> None:
        self.pairs = list(pairs)
        """The two tokens that token 256, 257, ... stands for."""
        self.tokens = [bytes([byte]) for byte in range(256)]
        """The bytes of each token."""
        for left, right in self.pairs:
            self.tokens.append(self.tokens[left] + self.tokens[right])

    @classmethod
    def learn(cls, text: str, size: int) -> Tokenizer:
        """`size` tokens: again and again the most frequent pair becomes one, the lowest of equally frequent pairs."""
        ids, pairs = _bytes(text), []
        for token in range(256, size):
            counts = np.bincount(ids[:-1] * token + ids[1:])
            left, right = divmod(int(counts.argmax()), token)
            pairs.append((left, right))
            ids = _merged(ids, left, right, token)
        return cls(pairs)

    def encode(self, text: str) -> torch.Tensor:
        """Token ids of a text: [T], int64."""
        ids = _bytes(text)
        for token, (left, right) in enumerate(self.pairs, start=256):
            ids = _merged(ids, left, right, token)
        return torch.from_numpy(ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids. Bytes that are no UTF-8, as a model may put them together, become U+FFFD."""
        return b"".join(self.tokens[token] for token in ids).decode(errors="replace")


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)


def _merged(ids: np.ndarray, left: int, right: int, token: int) -> np.ndarray:
    """`ids` with each pair (left, right) replaced by `token`, from the left: of three equal ones the first two."""
    found = np.flatnonzero((ids[:-1] == left) & (ids[1:] == right))
    if left == right:  # every other one of a row of overlapping pairs
        number = np.arange(len(found))
        first = np.maximum.accumulate(np.where(np.diff(found, prepend=-2) == 1, 0, number))
        found = found[(number - first) % 2 == 0]
    ids = ids.copy()
    ids[found] = token
    return np.delete(ids, found + 1)


class Windows(Dataset[torch.Tensor]):
    """Samples of a long text: windows [length + 1] of its tokens, one token more than the model reads.

    `count` windows lie evenly over the text, by default so many that they just cover it. Each epoch moves them by a
    part of their length, so that they do not always begin at the same words; which part, the epoch's number says alone.
    """

    def __init__(self, tokens: torch.Tensor, length: int, count: int | None = None) -> None:
        self._tokens = tokens
        self._length = length
        self._starts = len(tokens) - length
        self._count = count or -(-(len(tokens) - 1) // length)
        self._shift = 0

    def set_epoch(self, epoch: int) -> None:
        self._shift = int(epoch * _GOLDEN % 1 * self._length)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> torch.Tensor:
        even = index * (self._starts - 1) // max(1, self._count - 1)
        start = (even + self._shift) % self._starts
        return self._tokens[start : start + self._length + 1]
