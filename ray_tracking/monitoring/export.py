"""The effective history of a run as one file: Parquet, CSV or JSON lines.

In: a run's directory. Out: a file with the columns key, step, value, time, rank, attempt,
there whole or not at all.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from ray_tracking.errors import StorageError, UsageError
from ray_tracking.journal.reader import JournalReader
from ray_tracking.monitoring.jsontext import plain
from ray_tracking.storage import Storage

COLUMNS = ("key", "step", "value", "time", "rank", "attempt")
_ROWS_AT_ONCE = 50_000


def export_run(directory: Storage, output: Path, *, force: bool = False) -> int:
    """Write the effective history to a local file and return its number of rows.

    Raises UsageError for an ending it does not know or, without `force`, a file that is there;
    StorageError if the file can't be written.
    """
    write = check_output(output, force=force)
    table = JournalReader(directory).effective().select(list(COLUMNS))
    # The real ending stays last: writers may look at it.
    temporary = output.with_name(f".{output.stem}-{secrets.token_hex(4)}{output.suffix}")
    try:
        write(table, temporary)
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, output)
    except OSError as error:
        raise StorageError(f"Can't write {output}: {error}", hint="Choose another place with -o.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return int(table.num_rows)


def check_output(output: Path, *, force: bool = False) -> Callable[[pa.Table, Path], None]:
    """What writes this format, if the file may be written; see `export_run` for what is raised."""
    writer = _WRITERS.get(output.suffix.lower())
    if writer is None:
        found = f"the ending {output.suffix!r}" if output.suffix else "no ending"
        raise UsageError(
            f"{output.name} has {found}; the format is chosen by it.", hint=f"Allowed: {', '.join(_WRITERS)}."
        )
    if output.is_dir():
        raise UsageError(f"{output} is a folder.", hint="Name a file: -o history.parquet.")
    if output.exists() and not force:
        raise UsageError(f"{output} is there already.", hint="Overwrite it with --force, or name another file.")
    if not output.parent.is_dir():
        raise UsageError(f"There is no folder {output.parent} for {output.name}.", hint="Make it first.")
    return writer


def _write_parquet(table: pa.Table, path: Path) -> None:
    import pyarrow.parquet as pq

    pq.write_table(table, path, compression="zstd")


def _write_csv(table: pa.Table, path: Path) -> None:
    from pyarrow import csv

    csv.write_csv(table, path)


def _write_jsonl(table: pa.Table, path: Path) -> None:
    with open(path, "w", encoding="utf-8") as stream:
        for batch in table.to_batches(max_chunksize=_ROWS_AT_ONCE):
            for row in batch.to_pylist():
                stream.write(json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n")


_WRITERS: dict[str, Callable[[pa.Table, Path], None]] = {
    ".parquet": _write_parquet,
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
}
