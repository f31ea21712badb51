"""Checksums of event files, against TensorBoard's own."""

from __future__ import annotations

import struct

from hypothesis import example, given, settings
from hypothesis import strategies as st

from ray_tracking.tracking.backends.crc import masked_crc32c


@settings(deadline=None)
@given(st.binary(max_size=200))
@example(b"")
@example(bytes(range(256)) * 2)
@example(b"\xff" * 516)
def test_equals_tensorboard_s(data: bytes) -> None:
    from tensorboard.compat.tensorflow_stub import pywrap_tensorflow

    assert masked_crc32c(data) == struct.pack("<I", pywrap_tensorflow.masked_crc32c(data))
