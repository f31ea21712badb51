"""Journal payloads as the backends take them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_tracking.errors import BackendError
from ray_tracking.records import Artifact, Kind
from ray_tracking.tracking.backends.media import artifact_file, png_shape, storable
from tests.tracking.backends.records import png, record


@pytest.mark.parametrize(
    ("text", "stored"),
    [("plain é🎉", "plain é🎉"), ("a\0b", "a\\x00b"), ("\ud800", "\\ud800"), ("x" * 30, "x" * 14 + "…[cut]")],
)
def test_storable(text: str, stored: str) -> None:
    assert storable(text, 20) == stored


def test_png_shape() -> None:
    assert png_shape(png(7, 3)) == (3, 7, 3)
    assert png_shape(b"GIF89a") == (0, 0, 0)


def test_artifact_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b.txt").write_text("content")
    here = record(Kind.ARTIFACT, "x", Artifact("a/b.txt", 7, "").encode())
    with artifact_file(str(tmp_path), here) as path:
        assert path is not None
        assert (path.name, path.read_text()) == ("b.txt", "content")
    assert not path.exists()
    with artifact_file(str(tmp_path), record(Kind.ARTIFACT, "x", Artifact("gone", 7, "").encode())) as path:
        assert path is None


def test_an_artifact_that_cannot_be_read_is_tried_again(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    broken = record(Kind.ARTIFACT, "x", Artifact("folder", 7, "").encode())
    with pytest.raises(BackendError, match="'x' can't be read"), artifact_file(str(tmp_path), broken):
        pass
