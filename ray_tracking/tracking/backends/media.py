"""Journal payloads as the backends' clients want them: text that every store takes, the size of a PNG, params."""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ray_tracking.errors import BackendError, StorageError
from ray_tracking.records import Artifact, Record
from ray_tracking.storage import Storage

CUT = "…[cut]"
_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}  # PNG colour type -> samples per pixel (a palette shows as RGB)


def text_of(record: Record) -> str:
    """The record's UTF-8 payload; bytes that are not UTF-8 become the replacement character."""
    return (record.data or b"").decode("utf-8", "replace")


def storable(text: str, limit: int) -> str:
    """`text` for a database column: lone surrogates and NUL escaped, and cut to `limit` characters with a mark."""
    text = text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")
    return text if len(text) <= limit else text[: limit - len(CUT)] + CUT


def param_of(record: Record) -> Any:
    """The value of a PARAM record: what its JSON says."""
    return json.loads(record.data or b"null")


def param_text(value: Any) -> str:
    """A param as text: a string as it stands, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


class PngShape(NamedTuple):
    height: int
    width: int
    channels: int


def png_shape(data: bytes) -> PngShape:
    """Size in pixels and samples per pixel, from the header alone; zeros if it is no PNG."""
    if len(data) < 26 or data[:8] != b"\x89PNG\r\n\x1a\n":
        return PngShape(0, 0, 0)
    width, height = struct.unpack(">II", data[16:24])
    return PngShape(height, width, _CHANNELS.get(data[25], 0))


@contextmanager
def artifact_file(artifacts: str, record: Record) -> Iterator[Path | None]:
    """A local copy of an ARTIFACT record's file, gone afterwards; None if the file is no longer on storage."""
    artifact = Artifact.decode(record.data or b"")
    with tempfile.TemporaryDirectory(prefix="ray-tracking-") as folder:
        target = Path(folder) / Path(artifact.path).name
        try:
            with Storage.open(artifacts).open_input(artifact.path) as source, target.open("wb") as sink:
                while block := source.read(8 << 20):
                    sink.write(block)
        except FileNotFoundError:
            target = None  # type: ignore[assignment]
        except StorageError as error:
            raise BackendError(
                f"The artifact {record.key!r} can't be read: {error.message}", hint=error.hint
            ) from error
        yield target
