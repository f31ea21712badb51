"""A killed run beside an undisturbed one, both completed: everything that their directories and backends hold.

In: the two directories. Out: the evidence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ray_tracking.checkpoint import CheckpointStore
from ray_tracking.checkpoint.keys import Keyring
from ray_tracking.checkpoint.reader import OpenCheckpoint
from ray_tracking.journal.reader import JournalReader
from ray_tracking.records import Kind, Record
from ray_tracking.runs.store import RunStore
from ray_tracking.storage import Storage
from ray_tracking.testing.chaos.evidence import Difference, Evidence, Ignored, compare_histories, recoveries
from ray_tracking.testing.chaos.plan import Hit
from ray_tracking.testing.chaos.shown import compare_backends
from ray_tracking.testing.chaos.states import compare_states


def gather(
    runs: RunStore,
    undisturbed: str,
    killed: str,
    hits: Sequence[Hit],
    *,
    wanted: int,
    seed: int,
    ignored: Ignored,
    keyring: Keyring | None,
    synced: Sequence[str] = (),
) -> Evidence:
    """Compare all. Raises RayTrackingError if something can't be read."""
    first, second = runs.directory(undisturbed), runs.directory(killed)
    expected, found = (list(JournalReader(each).effective_records()) for each in (first, second))
    attempts = runs.load(killed).attempts
    return Evidence(
        killed,
        undisturbed,
        seed,
        wanted,
        recoveries(hits, rows(second), attempts),
        [
            *compare_checkpoints(first, second, keyring),
            compare_histories(expected, found, ignored),
            *compare_backends(second, ignored),
        ],
        last_step(first),
        len(attempts),
        sorted({row.key for row in expected if row.key in ignored}),
        synced,
    )


def rows(directory: Storage) -> Iterator[Record]:
    """All that was ever journaled, what counts no more among it."""
    reader, offset = JournalReader(directory), 0
    while found := reader.read(offset):
        yield from found
        offset = found[-1].offset + 1


def last_step(directory: Storage) -> int:
    """The highest step that was logged, 0 if none was."""
    return max((row.step for row in rows(directory) if row.kind is not Kind.ATTEMPT), default=0)


def compare_checkpoints(first: Storage, second: Storage, keyring: Keyring | None) -> list[Difference]:
    """The last checkpoint of each, rank by rank; one Difference that says why if they can't be compared."""
    newest = []
    for directory in (first, second):
        infos = CheckpointStore(directory, keyring=keyring).checkpoints()
        if not infos:
            why = f"{directory.uri} has no complete checkpoint: does the function call run.restore(model=..., ...)?"
            return [Difference("last checkpoint", 0, "tensors", changed=1, examples=(why,))]
        newest.append(max(infos, key=lambda info: info.order))
    one, other = newest
    if (one.step, one.epoch) != (other.step, other.epoch):
        why = f"that of the undisturbed run is of step {one.step}, epoch {one.epoch}; of the killed one of step "
        why += f"{other.step}, epoch {other.epoch}"
        return [Difference("last checkpoint", 0, "tensors", changed=1, examples=(why,))]
    with OpenCheckpoint(first, one, keyring) as expected, OpenCheckpoint(second, other, keyring) as found:
        return compare_states(expected, found)
