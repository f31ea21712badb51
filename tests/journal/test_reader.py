import pytest

from ray_tracking.errors import JournalError
from ray_tracking.journal import JournalReader, JournalWriter
from ray_tracking.records import Kind, Record
from tests.journal.helpers import FaultyStorage, began, call, scalar


def reads(storage: FaultyStorage) -> list[str]:
    return [operation for operation in storage.operations if operation.startswith("read_bytes")]


@pytest.fixture
def five(storage):
    """Five segments of three records."""
    writer = JournalWriter(storage, 1)
    return [writer.append(call(seq)) for seq in range(1, 6)]


def test_segments_before_the_cursor_are_not_read(storage, five):
    watched = FaultyStorage(storage, None)
    assert JournalReader(watched).read(10) == five[3][1:] + five[4]
    assert len(reads(watched)) == 2
    assert sum(table.num_rows for table in JournalReader(watched).tables(13)) == 2
    assert len(reads(watched)) == 3


def test_reading_on_in_small_bites_reads_each_segment_once(storage, five):
    watched = FaultyStorage(storage, None)
    reader, seen = JournalReader(watched), []
    while batch := reader.read(len(seen), limit=2):
        seen += batch
    assert seen == [record for batch in five for record in batch]
    assert len(reads(watched)) == 5
    assert sum(operation.startswith("walk") for operation in watched.operations) == 2


def test_a_reader_follows_the_writer(storage):
    reader, writer = JournalReader(storage), JournalWriter(storage, 1)
    assert reader.read() == []
    first = writer.append(call(1))
    assert reader.read() == first
    second = writer.append(call(2))
    assert reader.read(3) == second


def test_a_merge_between_two_reads_changes_nothing(storage, five, small_tiers):
    reader = JournalReader(storage)
    tables = reader.tables()
    seen = next(tables).column("offset").to_pylist()
    writer = JournalWriter(storage, 1)
    assert writer.merge() == 2
    writer.compact()
    for table in tables:
        seen += table.column("offset").to_pylist()
    assert seen == list(range(15))


def test_a_file_removed_behind_our_back_is_a_gap(storage, five):
    names = [name for name, _ in storage.walk("journal")]
    storage.delete(names[2])
    with pytest.raises(JournalError, match="offsets 6 to 8"):
        JournalReader(storage).read()
    lenient = JournalReader(storage, strict=False)
    assert lenient.read() == five[0] + five[1] + five[3] + five[4]
    assert lenient.skipped == ["offsets 6 to 8"]


def test_two_writers_at_once_are_named(storage, five):
    rival = JournalWriter(storage, 1)
    rival._next = rival._allocated = 13
    rival.append(call(9))
    with pytest.raises(JournalError, match="two writers"):
        JournalReader(storage).read()
    lenient = JournalReader(storage, strict=False)
    assert lenient.read() == [record for batch in five for record in batch]
    assert len(lenient.skipped) == 1


def test_a_damaged_last_segment_does_not_hold_a_lenient_reader(storage, five):
    name = [name for name, _ in storage.walk("journal")][-1]
    storage.write_bytes(name, b"")
    reader = JournalReader(storage, strict=False)
    assert reader.read(9) == five[3]
    assert reader.read(12) == []
    later = JournalWriter(storage, 1).append(call(6))
    assert reader.read(12) == later


def test_foreign_files_are_no_matter(storage, five):
    storage.write_bytes("journal/attempt-001/notes.txt", b"hello")
    storage.write_bytes("journal/attempt-001/000000000000-000000000099.arrow", b"hello")
    assert len(JournalReader(storage).read()) == 15


def test_effective_records_of_some_kinds_in_order(storage):
    writer = JournalWriter(storage, 1)
    param = Record(Kind.PARAM, "lr", 0, 1.0, None, b"0.1", 0, 1, 1)
    image = Record(Kind.IMAGE, "digits", 2, 1.0, None, b"\x89PNG" * 100, 0, 1, 2)
    writer.append([began(1, -1), param, scalar(1), image, scalar(3)])
    writer.begin_attempt(2)
    newer = param._replace(data=b"0.2", attempt=2)
    writer.append([began(2, 2), newer, scalar(3, 7.0, attempt=2)])
    reader = JournalReader(storage)
    everything = list(reader.effective_records())
    assert [(r.offset, r.kind) for r in everything] == [
        (2, "scalar"),
        (3, "image"),
        (6, "param"),
        (7, "scalar"),
    ]
    assert everything[1].data == image.data
    assert [r.data for r in reader.effective_records({Kind.PARAM, Kind.IMAGE})] == [image.data, b"0.2"]
    assert reader.resumes() == {1: -1, 2: 2}
