"""MLflow's SQLite database, made whole or not at all.

MLflow makes it in some fifty steps, which take seconds; one that was killed between them leaves a database that MLflow
refuses from then on. So it is made beside its place and put there when it is done.
"""

from __future__ import annotations

import os
import secrets
import threading
from pathlib import Path
from typing import Any

from ray_tracking.conditional import NO_LINKS

_making = threading.Lock()
"""MLflow's migrations are for one thread of a process at a time."""


def create_database(path: str, artifacts: str) -> None:
    """A database at `path`, with `artifacts` for its default experiment, unless there is one.

    Several may try at once: the first one's stays. Raises OSError, and what MLflow and SQLAlchemy raise.
    """
    with _making:
        if not os.path.exists(path):
            _make(path, artifacts)


def _make(path: str, artifacts: str) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    # None of what a killed process left: that is small, and found by its name.
    being_made = f"{path}.{secrets.token_hex(8)}.new"
    try:
        make: Any = SqlAlchemyStore
        make(f"sqlite:///{being_made}", artifacts).engine.dispose()
        _put(being_made, path)
    finally:
        for name in (being_made, f"{being_made}-journal", f"{being_made}-wal", f"{being_made}-shm"):
            Path(name).unlink(missing_ok=True)


def _put(made: str, path: str) -> None:
    """Replaces nothing, unlike a rename; where the file system has no hard links, as far as can be seen."""
    try:
        os.link(made, path)
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if not os.path.exists(path):
            os.rename(made, path)
