"""What of the working directory goes to the cluster: chosen by Ray's own rules, counted before anything is sent.

In: a directory, patterns, the place of the runs. Out: `Package`, or a UsageError that names the largest files.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE, get_runtime_env_default_excludes
from ray._private.runtime_env import packaging

from ray_tracking.errors import UsageError
from ray_tracking.storage import Storage

EXCLUDES = (
    ".git", ".hg", ".svn", ".venv", "venv", "__pycache__", "*.pyc", ".mypy_cache", ".ruff_cache", ".pytest_cache",
    ".hypothesis", ".ipynb_checkpoints", ".tox", ".nox", "node_modules", ".DS_Store", "wandb", "mlruns", "mlflow.db",
    "/runs",
    # what people keep secrets in
    ".env", ".env.*", ".netrc", "*.pem", "*.key", "auth_token",
)  # fmt: skip
"""Left out in any case, as lines of a .gitignore. A directory's .gitignore and .rayignore count too."""
LIMIT = min(DASHBOARD_CLIENT_MAX_SIZE, packaging.GCS_STORAGE_MAX_SIZE)
"""Bytes: the dashboard refuses larger requests, and the package is one."""
_LARGEST = 5
_QUIET = logging.Logger("ray_tracking.package", logging.CRITICAL)  # ours says what is left out
_PER_FILE = 160
"""A zip's own bytes per file, besides its name twice."""


@dataclass(frozen=True, slots=True)
class Package:
    """`files`: (path relative to `directory`, bytes), the largest first; `excludes`: for Ray's `runtime_env`."""

    directory: str
    excludes: tuple[str, ...]
    files: tuple[tuple[str, int], ...]

    @property
    def size(self) -> int:
        """Bytes of the zip that Ray makes; it does not compress."""
        return sum(size + 2 * len(os.fsencode(name)) + _PER_FILE for name, size in self.files)

    @property
    def largest(self) -> tuple[tuple[str, int], ...]:
        return self.files[:_LARGEST]

    def holds(self, path: Path) -> bool:
        """Whether this file is sent."""
        try:
            relative = path.resolve().relative_to(Path(self.directory).resolve())
        except ValueError:
            return False
        return str(relative) in {name for name, _ in self.files}


def choose(directory: Path, patterns: Iterable[str] = (), storage: Storage | None = None) -> Package:
    """Look at what would be sent. `patterns`: of the user; `storage`: of the runs, left out if it lies inside.

    Raises UsageError if there is no such directory.
    """
    root = directory.expanduser().resolve()
    if not root.is_dir():
        raise UsageError(
            f"The working directory {directory} is no folder.", hint="Give the folder of your code with --working-dir."
        )
    excludes = (*EXCLUDES, *_inside(root, storage), *patterns)
    matches = packaging._get_excludes(root, [*get_runtime_env_default_excludes(), *excludes])
    found: list[tuple[str, int]] = []

    def take(path: Path) -> None:
        if path.is_file():
            found.append((str(path.relative_to(root)), path.stat().st_size))

    with_gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    try:
        packaging._dir_travel(root, [matches], take, include_gitignore=with_gitignore, logger=_QUIET)
    except OSError as error:
        raise UsageError(
            f"The working directory can't be read: {error}", hint="Leave the place out with --exclude."
        ) from error
    return Package(str(root), excludes, tuple(sorted(found, key=lambda item: (-item[1], item[0]))))


def check_size(package: Package, limit: int = LIMIT) -> None:
    """Raise UsageError naming the largest files if Ray would not take it."""
    if package.size <= limit:
        return
    largest = "".join(f"\n  {_megabytes(size):>10}  {name}" for name, size in package.largest)
    raise UsageError(
        f"The working directory {package.directory} is {_megabytes(package.size)} in {len(package.files)} files, more "
        f"than the {_megabytes(limit)} that Ray takes. The largest:{largest}",
        hint="Leave out what training does not need, with --exclude PATTERN or a .rayignore file (as .gitignore); "
        "put data on the shared storage.",
    )


def _inside(root: Path, storage: Storage | None) -> Sequence[str]:
    if storage is None or not storage.is_local:
        return ()
    place = Path(storage.root).resolve()
    if place == root or not place.is_relative_to(root):
        return ()
    return (f"/{place.relative_to(root)}",)


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB"
