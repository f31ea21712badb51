"""The checksum of event files: CRC-32C, masked as TensorFlow's record format wants it. TensorBoard's goes byte by byte.

In: bytes. Out: the four bytes that follow a length or an event.
"""

from __future__ import annotations

import struct

import google_crc32c

_MASK_DELTA = 0xA282EAD8
_ALL = 0xFFFFFFFF


def masked_crc32c(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + _MASK_DELTA) & _ALL)
