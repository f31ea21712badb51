"""The checksum in event files, CRC-32C, over blocks at a time; TensorBoard's own goes byte by byte.

In: bytes. Out: what TensorFlow's record format calls their masked CRC.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any

import numpy as np

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, bits reversed
_BLOCK = 512
_MASK_DELTA = 0xA282EAD8
_ALL = 0xFFFFFFFF


@lru_cache(1)
def _tables() -> tuple[Any, Any]:
    """[_BLOCK * 256] what a byte at each place of a block adds to the CRC at its end; [_BLOCK] where a place begins."""
    last = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        last = np.where(last & 1, (last >> 1) ^ np.uint32(_POLYNOMIAL), last >> 1)
    places = [last]
    for _ in range(_BLOCK - 1):
        places.append((places[-1] >> 8) ^ last[places[-1] & 0xFF])
    return np.concatenate(places[::-1]), np.arange(_BLOCK) * 256


def crc32c(data: bytes) -> int:
    """CRC-32C as in RFC 3720. A block's CRC is the sum (xor) of what each of its bytes adds by itself."""
    table, begins = _tables()
    state = _ALL
    for begin in range(0, len(data), _BLOCK):
        block = np.frombuffer(data[begin : begin + _BLOCK], np.uint8).astype(np.int64)
        size = len(block)
        block[:4] ^= np.frombuffer(struct.pack("<I", state), np.uint8)[:size]
        state = int(np.bitwise_xor.reduce(table.take(block + begins[_BLOCK - size :]))) ^ (state >> 8 * size)
    return state ^ _ALL


def masked_crc32c(data: bytes) -> bytes:
    """The four bytes that follow a length or an event in an event file."""
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + _MASK_DELTA) & _ALL)
