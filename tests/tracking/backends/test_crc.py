"""Checksums of event files, against TensorBoard's own."""

from __future__ import annotations

import struct

from hypothesis import example, given, settings
from hypothesis import strategies as st

from ray_tracking.tracking.backends.crc import crc32c, masked_crc32c


@settings(deadline=None)
@given(st.binary(max_size=20).flatmap(lambda part: st.integers(0, 150).map(lambda count: part * count)))
@example(b"")
@example(bytes(range(256)) * 2)
@example(bytes(513))
@example(b"\xff" * 515)
@example(b"\xff" * 516)
def test_equals_tensorboard_s(data: bytes) -> None:
    from tensorboard.compat.tensorflow_stub import pywrap_tensorflow

    assert crc32c(data) == pywrap_tensorflow.crc32c(data)
    assert masked_crc32c(data) == struct.pack("<I", pywrap_tensorflow.masked_crc32c(data))


def test_of_rfc_3720() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
