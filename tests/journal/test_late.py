"""A writer that was stopped between the look at its lease and its write, and writes after another one has begun."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ray_tracking.errors import LeaseLostError, StorageError
from ray_tracking.journal import JournalReader, JournalWriter
from ray_tracking.journal.files import find
from ray_tracking.journal.lineage import effective_records
from ray_tracking.records import Record
from ray_tracking.storage import Storage
from tests.journal.helpers import began, call, plain

OLD, NEW = (1, 1), (2, 1)


class Held(Storage):
    """Keeps the next write back: `land` does it, as a process that goes on after SIGSTOP does."""

    def __init__(self, like: Storage) -> None:
        super().__init__(like.filesystem, like.root, like.uri)
        self.hold = False
        self.land: Callable[[], None] = lambda: None

    def write_bytes(self, name: str, data: bytes | memoryview) -> None:
        if not self.hold:
            super().write_bytes(name, data)
            return
        held = bytes(data)
        self.land = lambda: Storage.write_bytes(self, name, held)
        raise KeyboardInterrupt


class Check:
    """A lease's `check`, lost when it is told."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.asked = 0

    def __call__(self) -> None:
        self.asked += 1
        if self.error is not None:
            raise self.error


def stale(storage: Storage, records: list[Record]) -> Callable[[], None]:
    """A writer that has written call 1 and was stopped while it wrote `records`: what it does when it goes on."""
    held = Held(storage)
    writer = JournalWriter(held, 1, term=OLD)
    writer.append([began(1, -1), *call(1)])
    held.hold = True
    with pytest.raises(KeyboardInterrupt):
        writer.append(records)
    return held.land


def read_on(reader: JournalReader, found: list[Record]) -> list[Record]:
    """As delivery reads: from where it stands, until there is no more."""
    while more := reader.read(len(found)):
        found += more
    return found


EARLY = [began(1, -1), *call(1)]
LATE = [*call(2), *call(3, rank=1), *call(4), *call(5)]


@pytest.mark.parametrize("attempt", [1, 2], ids=["the same attempt", "the next attempt"])
@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_one_effective_history(any_storage, attempt, moment):
    """The late segment lands before the next writer writes, between two of its appends, or after all of them."""
    storage = any_storage
    land = stale(storage, LATE)
    writer = JournalWriter(storage, attempt, term=NEW if attempt == 2 else (1, 2))
    reader, shown = JournalReader(storage, end=lambda: writer.next_offset), []
    first = [began(2, 0), *call(1, attempt=2)] if attempt == 2 else call(2)
    second = call(2, attempt=2) if attempt == 2 else [*call(3), *call(3, rank=1)]
    if moment == "before":
        land()
        assert plain(read_on(reader, shown)) == EARLY, "what is not its own yet is not shown to its backends"
    told = writer.append(first)
    if moment == "between":
        land()
        assert plain(read_on(reader, shown)) == EARLY + first
    told += writer.append(second)
    if moment == "after":
        land()
    expected = EARLY + first + second
    assert plain(told) == first + second
    assert plain(read_on(reader, shown)) == expected
    assert plain(JournalReader(storage).read()) == expected
    assert JournalReader(storage).next_offset == len(expected)
    assert [record.offset for record in told] == list(range(len(EARLY), len(expected)))

    # Nor does the next one take it for something, nor are merging and compacting led astray.
    third = JournalWriter(storage, attempt, term=(3, 1))
    assert third.next_offset == len(expected)
    assert third.last_seq(attempt, 0) == 2 if attempt == 2 else 3
    more = call(9, attempt=attempt)
    third.append(more)
    third.merge()
    assert plain(JournalReader(storage).read()) == expected + more
    third.compact()
    assert plain(JournalReader(storage).read()) == expected + more
    assert plain(JournalReader(storage).effective_records()) == plain(effective_records(expected + more))


def test_it_lands_after_the_run_was_compacted(any_storage):
    land = stale(any_storage, LATE * 5)
    writer = JournalWriter(any_storage, 2, term=NEW)
    writer.append([began(2, 0), *call(1, attempt=2)])
    writer.compact()
    whole = JournalReader(any_storage).read()
    land()
    assert JournalReader(any_storage).read() == whole
    assert len(find(any_storage).late) == 1
    later = JournalWriter(any_storage, 3, term=(3, 1))
    later.append([began(3, 1)])
    assert plain(JournalReader(any_storage).read()) == [*plain(whole), began(3, 1)]


def test_one_that_landed_in_time_is_part_of_it(storage):
    """It was not acknowledged, so it may be there; then everyone has to see it."""
    land = stale(storage, LATE)
    land()
    writer = JournalWriter(storage, 2, term=NEW)
    writer.append([began(2, 5)])
    assert plain(JournalReader(storage).read()) == [*EARLY, *LATE, began(2, 5)]
    assert writer.last_seq(1, 0) == 5


def test_nothing_is_written_once_the_lease_is_lost(storage):
    check = Check()
    writer = JournalWriter(storage, 1, check=check)
    writer.append(call(1))
    check.error = LeaseLostError("another one writes")
    names = [name for name, _ in storage.walk()]
    for act in (lambda: writer.append(call(2)), writer.compact):
        with pytest.raises(LeaseLostError):
            act()
    assert [name for name, _ in storage.walk()] == names


def test_an_append_is_acknowledged_only_if_it_came_in_time(storage):
    """The lease is lost while the segment is written: it may be there, but nobody is told so."""
    check, asked = Check(), []

    def look() -> None:
        asked.append(1)
        if len(asked) == 2:
            check.error = LeaseLostError("another one writes")
        check()

    writer = JournalWriter(storage, 1, term=OLD, check=look)
    with pytest.raises(LeaseLostError):
        writer.append(call(1))
    assert writer.next_offset == 0
    assert plain(JournalReader(storage).read()) == call(1)


def test_a_storage_that_can_not_be_asked_afterwards_doubles_nothing(storage):
    """Written, but not known to be in time: told with the next append, written once."""
    asked: list[int] = []

    def look() -> None:
        asked.append(1)
        if len(asked) == 2:
            raise StorageError("away for a moment")

    writer = JournalWriter(storage, 1, check=look)
    with pytest.raises(StorageError):
        writer.append(call(1))
    assert plain(writer.append([*call(1), *call(2)])) == [*call(1), *call(2)]
    assert plain(JournalReader(storage).read()) == [*call(1), *call(2)]


def test_upkeep_is_not_begun_without_the_lease(storage, small_tiers):
    check = Check()
    writer = JournalWriter(storage, 1, check=check)
    for seq in range(1, 5):
        writer.append(call(seq))
    names = [name for name, _ in storage.walk()]
    check.error = LeaseLostError("another one writes")
    with pytest.raises(LeaseLostError):
        writer.merge()
    assert [name for name, _ in storage.walk()] == names
    check.error = None
    assert writer.merge() > 0


def test_the_look_costs_nothing_to_speak_of(storage):
    """Two for each append: they are clock looks."""
    check = Check()
    writer = JournalWriter(storage, 1, check=check)
    for seq in range(1, 11):
        writer.append(call(seq))
    assert check.asked == 20
