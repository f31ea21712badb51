import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_tracking.errors import JournalError
from ray_tracking.journal import files, schema
from tests.journal.helpers import call

ROWS = schema.table_of(schema.number([record for seq in range(1, 40) for record in call(seq)], 100))


@pytest.mark.parametrize("attempt", [1, None])
def test_a_segment_is_named_by_its_offsets_and_comes_back(storage, attempt):
    segment, data = files.pack(ROWS, attempt)
    assert (segment.first, segment.last, segment.rows) == (100, 216, 117)
    storage.write_bytes(segment.name, data)
    assert files.find(storage).live == (segment,)
    assert schema.records_of_table(files.load(storage, segment)) == schema.records_of_table(ROWS)
    assert files.load(storage, segment, ["step", "key"]).column_names == ["step", "key"]


@pytest.mark.parametrize("attempt", [1, None])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_one_flipped_bit_is_found_and_the_file_named(storage, attempt, data):
    segment, content = files.pack(ROWS, attempt)
    broken = bytearray(content)
    broken[data.draw(st.integers(0, len(broken) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    storage.write_bytes(segment.name, bytes(broken))
    with pytest.raises(JournalError, match=segment.digest):
        files.load(storage, segment)


@pytest.mark.parametrize("content", [b"", b"ARROW1", b"PAR1" * 20])
def test_an_empty_or_cut_file_is_found(storage, content):
    segment, data = files.pack(ROWS, 1)
    storage.write_bytes(segment.name, content or bytes(data[: len(data) // 2]))
    with pytest.raises(JournalError, match="damaged"):
        files.load(storage, segment)


def test_a_valid_file_under_another_files_name_is_refused(storage):
    segment, data = files.pack(ROWS, 1)
    other = segment.__class__(0, 9, segment.digest, 1, segment.size)
    storage.write_bytes(other.name, data)
    with pytest.raises(JournalError, match="its name says"):
        files.load(storage, other)


def test_a_file_that_is_no_arrow_file_is_refused(storage):
    import xxhash

    segment = files.Segment(0, 9, xxhash.xxh3_64_hexdigest(b"not arrow"), 1, 9)
    storage.write_bytes(segment.name, b"not arrow")
    with pytest.raises(JournalError, match="no segment"):
        files.load(storage, segment)


def test_a_newer_format_is_refused_by_version(storage):
    newer = ROWS.replace_schema_metadata({schema.VERSION_KEY: b"2"})
    segment, data = files.pack(newer, None)
    storage.write_bytes(segment.name, data)
    with pytest.raises(JournalError, match="format b'2'"):
        files.load(storage, segment)
