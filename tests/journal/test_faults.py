"""A fault at every operation on storage: what is acknowledged is there once, the rest whole or absent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ray_tracking.errors import StorageError
from ray_tracking.journal import JournalReader, JournalWriter
from ray_tracking.records import Record
from ray_tracking.storage import Storage
from tests.journal.helpers import FaultyStorage, Killed, began, call, disk_full, plain

BATCHES = [
    [began(1, -1), *call(1)],
    *([*call(seq), *call(seq, rank=1)] for seq in range(2, 9)),
]
EVERYTHING = [record for batch in BATCHES for record in batch]
STEPS = ["append"] * 4 + [
    "merge",
    "append",
    "append",
    "merge",
    "compact",
    "append",
    "append",
    "merge",
    "compact",
]


def work(writer: JournalWriter, told: list, *, retry: bool = False) -> None:
    """All of STEPS; what is acknowledged goes to `told`. `retry` repeats what raised, as the tracker does."""
    batches = iter(BATCHES)
    for step in STEPS:
        batch = next(batches) if step == "append" else None
        while True:
            try:
                if batch is not None:
                    told.extend(writer.append(batch))
                else:
                    getattr(writer, step)()
            except StorageError:
                if not retry:
                    raise
                continue
            break


def fresh(tmp_path: Path, number: int) -> Storage:
    return Storage.open(tmp_path / f"run-{number}")


@pytest.fixture
def operations(tmp_path, small_tiers, monkeypatch) -> int:
    """How many operations on storage the work takes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no power fails here, and there are thousands
    watched = FaultyStorage(Storage.open(tmp_path / "watched"), None)
    told: list = []
    work(JournalWriter(watched, 1), told)
    assert plain(told) == EVERYTHING
    count = len(watched.operations)
    assert JournalReader(watched).read() == told
    verbs = {operation.split()[0] for operation in watched.operations}
    assert verbs == {"write_bytes", "read_bytes", "delete", "delete_dir", "walk"}
    return count


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_killed_at_any_operation(tmp_path, operations, done):
    for number in range(operations):
        storage = fresh(tmp_path, number)
        told: list = []
        with pytest.raises(Killed):
            work(JournalWriter(FaultyStorage(storage, number, done=done), 1), told)

        found = JournalReader(storage).read()
        assert found[: len(told)] == told, f"operation {number}"
        unsure = next((batch for batch in BATCHES if batch[:1] == EVERYTHING[len(told) :][:1]), [])
        assert plain(found) in (EVERYTHING[: len(told)], EVERYTHING[: len(told)] + unsure), f"operation {number}"

        # The next process: senders resend all that was not acknowledged, doubles are dropped by last_seq.
        writer = JournalWriter(storage, 1)
        assert writer.next_offset == len(found)
        for batch in BATCHES:
            writer.append([record for record in batch if not known(writer, record, found)])
        assert plain(JournalReader(storage).read()) == EVERYTHING, f"operation {number}"
        while writer.merge():
            pass
        writer.compact()
        assert plain(JournalReader(storage).read()) == EVERYTHING, f"operation {number}"
        assert len(list(storage.walk("journal"))) == 1


def known(writer: JournalWriter, record: Record, found: list[Record]) -> bool:
    if not record.seq:  # the attempt's own record: the tracker writes it first, if the journal lacks it
        return bool(found)
    return record.seq <= writer.last_seq(record.attempt, record.rank)


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_storage_fails_at_any_operation_and_works_again(tmp_path, operations, done):
    for number in range(1, operations):  # operation 0 is the listing when the writer is made
        storage = fresh(tmp_path, number)
        told: list = []
        faulty = FaultyStorage(storage, number, done=done, fault=disk_full)
        work(JournalWriter(faulty, 1), told, retry=True)
        assert len(faulty.operations) > number
        assert plain(told) == EVERYTHING, f"operation {number}"
        assert JournalReader(storage).read() == told, f"operation {number}"
        assert [name.rpartition(".")[2] for name, _ in storage.walk("journal")] == ["parquet"], f"operation {number}"


CHILD = """
import sys, threading
from ray_tracking.journal import JournalWriter, segments
from ray_tracking.records import Record
from ray_tracking.storage import Storage
from tests.journal.helpers import call
segments.FAN_OUT = 3
writer = JournalWriter(Storage.open(sys.argv[1]), 1)
def upkeep():
    while True:
        writer.merge() or writer.compact()
seq = writer.last_seq(1, 0)
threading.Thread(target=upkeep, daemon=True).start()
while True:
    seq += 1
    writer.append(call(seq))
    print(seq, flush=True)
"""


def test_sigkill_again_and_again(tmp_path):
    """A real process, killed in the middle of appending, merging and compacting; each next one goes on."""
    storage, acknowledged = Storage.open(tmp_path / "run"), 0
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    for round_ in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, storage.uri],
            cwd=root,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            lines = [child.stdout.readline() for _ in range(8)]  # however slow the disk is
            assert all(line.strip().isdigit() for line in lines)
            time.sleep(0.1 + 0.07 * round_)
        finally:
            os.kill(child.pid, signal.SIGKILL)
            output = child.communicate()[0]
        acknowledged = max(acknowledged, *(int(line) for line in [*lines, *output.splitlines()[:-1]]))
        rows = plain(JournalReader(storage).read(limit=10**7))
        written = rows[-1].seq
        assert written >= acknowledged
        assert rows == [record for seq in range(1, written + 1) for record in call(seq)], f"round {round_}"
    assert acknowledged > 20
