"""What the journal promises, the same on a local directory and on S3."""

import pytest

from ray_tracking.errors import JournalError
from ray_tracking.journal import JournalReader, JournalWriter
from ray_tracking.records import Kind, Record
from ray_tracking.storage import Storage
from tests.journal.helpers import began, call, plain, scalar


def test_a_run_killed_and_resumed_then_ended(any_storage, small_tiers):
    """Append, resume in another process, merge, compact, resume again: one history, offsets without a gap."""
    writer = JournalWriter(any_storage, 1)
    sent = [began(1, -1), *(scalar(step, seq=step) for step in range(1, 8))]
    told = [record for at in range(0, 8, 2) for record in writer.append(sent[at : at + 2])]
    assert [record.offset for record in told] == list(range(8))
    assert plain(told) == sent

    reader = JournalReader(any_storage)
    assert reader.read() == told
    assert reader.read(3, limit=2) == told[3:5]
    assert reader.read(8) == []

    second = JournalWriter(any_storage, 2)
    assert second.next_offset == reader.next_offset == 8
    assert second.last_seq(1, 0) == 7
    assert second.last_seq(2, 0) == 0
    resumed = [
        began(2, 4),
        scalar(5, 9.0, attempt=2, seq=1),
        Record(Kind.PARAM, "lr", 5, 1.0, None, b"1", 0, 2, 2),
    ]
    told += second.append(resumed[:1]) + second.append(resumed[1:])

    assert second.merge() == 2  # three of attempt 1's segments become one
    assert reader.read() == told
    assert reader.effective().to_pydict() == {
        "key": ["loss"] * 5,
        "step": [1, 2, 3, 4, 5],
        "value": [0.5] * 4 + [9.0],
        "time": [1.7e9 + step for step in range(1, 6)],
        "rank": [0] * 5,
        "attempt": [1] * 4 + [2],
    }
    second.compact()
    assert [name.rpartition(".")[2] for name, _ in any_storage.walk("journal")] == ["parquet"]
    assert JournalReader(any_storage).read() == told

    third = JournalWriter(any_storage, 3)
    assert third.next_offset == 10 + 1
    assert (third.last_seq(1, 0), third.last_seq(2, 0), third.last_seq(3, 0)) == (7, 2, 0)
    told += third.append([began(3, 5)])
    third.compact()
    assert JournalReader(any_storage).read() == told
    assert len(list(any_storage.walk("journal"))) == 1
    assert [r.kind for r in JournalReader(any_storage).effective_records([Kind.PARAM])] == [Kind.PARAM]


def test_damage_is_named_or_left_out_loudly(any_storage, caplog):
    writer = JournalWriter(any_storage, 1)
    told = [writer.append(call(seq)) for seq in (1, 2, 3)]
    name, size = list(any_storage.walk("journal"))[1]
    content = bytearray(any_storage.read_bytes(name))
    content[size // 2] ^= 4
    any_storage.write_bytes(name, bytes(content))

    with pytest.raises(JournalError, match=name.rpartition("/")[2]):
        JournalReader(any_storage).read()
    assert JournalReader(any_storage).read(6) == told[2]  # what comes after it is not concerned

    lenient = JournalReader(any_storage, strict=False)
    assert lenient.read() == told[0] + told[2]
    assert lenient.skipped == [name]
    assert name.rpartition("/")[2] in caplog.text

    with pytest.raises(JournalError, match=name.rpartition("/")[2]):
        writer.compact()
    assert any_storage.exists(name)
    assert JournalReader(any_storage, strict=False).read() == told[0] + told[2]
    assert JournalWriter(any_storage, 1).next_offset == 9


def test_an_empty_journal(any_storage):
    reader = JournalReader(any_storage)
    assert (reader.next_offset, reader.read(), reader.effective().num_rows) == (0, [], 0)
    assert list(reader.effective_records()) == []
    writer = JournalWriter(any_storage, 1)
    assert (writer.append([]), writer.merge(), writer.last_seq(1, 0)) == ([], 0, 0)
    writer.compact()
    assert isinstance(any_storage, Storage)
    assert list(any_storage.walk()) == []
