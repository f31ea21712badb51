"""A page's file: there whole or not at all. In: HTML and a local path."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from ray_tracking.errors import StorageError, UsageError

_ENDINGS = (".html", ".htm")


def check_page(path: Path, *, force: bool) -> None:
    """Raises UsageError if a page may not be written there."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder.", hint=f"Name a file: -o {path / 'report.html'}.")
    if path.suffix.lower() not in _ENDINGS:
        raise UsageError(f"{path.name} is no name of a page.", hint=f"Allowed endings: {', '.join(_ENDINGS)}.")
    if path.exists() and not force:
        raise UsageError(f"{path} is there already.", hint="Overwrite it with --force, or name another file with -o.")
    if not path.parent.is_dir():
        raise UsageError(f"There is no folder {path.parent} for {path.name}.", hint="Make it first.")


def write_page(page: str, path: Path) -> None:
    """Raises StorageError if it can't be written."""
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write(page)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(f"Can't write {path}: {error}", hint="Choose another place with -o.") from error
    finally:
        temporary.unlink(missing_ok=True)
