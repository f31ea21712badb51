"""Records for these tests, as the journal would give them."""

from __future__ import annotations

import io
from collections.abc import Iterable

from ray_tracking.records import Kind, Record
from tests.readback import Point

START = 1_700_000_000.0


def scalars(points: Iterable[Point], offset: int = 0) -> list[Record]:
    """One record per point, with rising offsets; a step's records share a time."""
    return [
        Record(Kind.SCALAR, key, step, START + step, value, offset=offset + i)
        for i, (key, step, value) in enumerate(points)
    ]


def grid(steps: Iterable[int], keys: int = 3) -> list[Point]:
    return [(f"train/m{k}", step, step + k / 10) for step in steps for k in range(keys)]


def record(kind: Kind, key: str, data: bytes, step: int = 3, offset: int = -1) -> Record:
    return Record(kind, key, step, START + step, None, data, offset=offset)


def png(width: int = 5, height: int = 4) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 90)).save(buffer, "PNG")
    return buffer.getvalue()
