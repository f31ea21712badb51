import threading

import pytest

from ray_tracking.errors import JournalError, StorageError
from ray_tracking.journal import JournalReader, JournalWriter
from ray_tracking.storage import Storage
from tests.journal.helpers import FaultyStorage, began, call, disk_full, plain, scalar


class Unreliable(Storage):
    """Storage whose writes fail while `broken`: after the file is there ("reply lost") or before ("full")."""

    broken: str | None = None

    def write_bytes(self, name, data):
        if self.broken != "full":
            super().write_bytes(name, data)
        if self.broken:
            raise disk_full()


@pytest.fixture
def unreliable(storage):
    return Unreliable(storage.filesystem, storage.root, storage.uri)


@pytest.mark.parametrize("how", ["full", "reply lost"])
def test_the_same_records_again_after_a_failure_are_there_once(unreliable, how):
    writer = JournalWriter(unreliable, 1)
    first = writer.append(call(1))
    unreliable.broken = how
    for _ in range(3):
        with pytest.raises(StorageError):
            writer.append(call(2))
    assert writer.next_offset == 3
    unreliable.broken = None
    again = writer.append(call(2))
    assert JournalReader(unreliable).read() == first + again
    assert plain(again) == call(2)


@pytest.mark.parametrize("how", ["full", "reply lost"])
def test_other_records_after_a_failure_come_after_those_that_failed(unreliable, how):
    writer = JournalWriter(unreliable, 1)
    unreliable.broken = how
    with pytest.raises(StorageError):
        writer.append(call(1) + call(1, rank=1))
    with pytest.raises(StorageError):
        writer.append(call(1, rank=1) + call(2))
    unreliable.broken = None
    told = writer.append(call(2) + call(3))
    assert plain(told) == call(1) + call(1, rank=1) + call(2) + call(3)
    assert JournalReader(unreliable).read() == told
    assert writer.append([]) == []


def test_records_without_a_seq_are_recognised_too(unreliable):
    writer = JournalWriter(unreliable, 1)
    unreliable.broken = "full"
    with pytest.raises(StorageError):
        writer.append([began(1, -1)])
    unreliable.broken = None
    assert plain(writer.append([began(1, -1), scalar(1)])) == [began(1, -1), scalar(1)]


def test_last_seq_counts_only_what_is_durable(unreliable):
    writer = JournalWriter(unreliable, 1)
    writer.append(call(4) + call(2, rank=1))
    unreliable.broken = "full"
    with pytest.raises(StorageError):
        writer.append(call(5))
    assert (writer.last_seq(1, 0), writer.last_seq(1, 1), writer.last_seq(1, 2)) == (4, 2, 0)
    unreliable.broken = None
    writer.append([])
    assert writer.last_seq(1, 0) == 5


def test_merging_after_a_failure_leaves_the_unsure_segment_alone(unreliable, small_tiers):
    writer = JournalWriter(unreliable, 1)
    for seq in (1, 2):
        writer.append(call(seq))
    unreliable.broken = "reply lost"
    with pytest.raises(StorageError):
        writer.append(call(3))
    unreliable.broken = None
    assert writer.merge() == 0
    writer.append(call(3))
    assert writer.merge() == 2
    assert plain(JournalReader(unreliable).read()) == call(1) + call(2) + call(3)


def test_compacting_settles_a_failed_append_and_its_retry_adds_nothing(unreliable):
    writer = JournalWriter(unreliable, 1)
    unreliable.broken = "full"
    with pytest.raises(StorageError):
        writer.append(call(1))
    unreliable.broken = None
    writer.compact()
    assert plain(writer.append(call(1))) == call(1)
    writer.append(call(2))
    assert plain(JournalReader(unreliable).read()) == call(1) + call(2)


def test_a_record_that_can_not_be_stored_leaves_no_trace(storage):
    writer = JournalWriter(storage, 1)
    with pytest.raises(JournalError, match="value"):
        writer.append([*call(1), scalar(1)._replace(value="high")])
    with pytest.raises(JournalError, match="begin_attempt"):
        writer.append(call(1, attempt=2))
    assert list(storage.walk()) == []
    assert [record.offset for record in writer.append(call(1))] == [0, 1, 2]


def test_late_records_of_an_earlier_attempt_are_counted(storage):
    writer = JournalWriter(storage, 1)
    writer.append(call(1))
    writer.begin_attempt(2)
    writer.append(call(1, attempt=2) + call(2, attempt=1))
    again = JournalWriter(storage, 2)
    assert (again.last_seq(2, 0), again.last_seq(1, 0)) == (1, 2)


def test_attempts_only_rise(storage):
    writer = JournalWriter(storage, 2)
    writer.append(call(1, attempt=2))
    for attempt in (0, 1):
        with pytest.raises(JournalError, match="attempt"):
            writer.begin_attempt(attempt)
    with pytest.raises(JournalError, match="attempt 2"):
        JournalWriter(storage, 1)


def test_a_damaged_history_does_not_stop_a_resume(storage):
    writer = JournalWriter(storage, 1)
    writer.append(call(1))
    writer.compact()
    ((name, _),) = storage.walk("journal")
    storage.write_bytes(name, b"PAR1 torn")
    again = JournalWriter(storage, 2)
    assert again.last_seq(1, 0) == 0
    told = again.append(call(1, attempt=2))
    assert [record.offset for record in told] == [3, 4, 5]
    assert JournalReader(storage).read(3) == told


def test_threads_append_side_by_side_while_merging_and_reading(storage, small_tiers):
    writer, failures, read_through = JournalWriter(storage, 1), [], threading.Event()

    def send(rank: int) -> None:
        for seq in range(1, 41):
            writer.append(call(seq, rank=rank))

    def read() -> None:
        reader, seen = JournalReader(storage), 0
        while seen < 3 * 3 * 40:
            for record in reader.read(seen, 50):
                if record.offset != seen:
                    failures.append((record.offset, seen))
                seen += 1
        read_through.set()

    threads = [threading.Thread(target=send, args=(rank,)) for rank in range(3)]
    threads += [threading.Thread(target=read)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads[:3]):
        writer.merge()
    writer.compact()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert read_through.is_set()
    assert failures == []
    rows = JournalReader(storage).read(limit=10**6)
    assert sorted((r.rank, r.seq, r.key) for r in rows) == sorted(
        (r.rank, r.seq, r.key) for rank in range(3) for seq in range(1, 41) for r in call(seq, rank=rank)
    )


def test_an_append_is_one_operation_on_storage(storage):
    watched = FaultyStorage(storage, None)
    writer = JournalWriter(watched, 1)
    watched.operations.clear()
    writer.append(call(1))
    assert [operation.split()[0] for operation in watched.operations] == ["write_bytes"]
