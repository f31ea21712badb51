import math

import pytest

from ray_tracking.errors import JournalError
from ray_tracking.journal import schema
from ray_tracking.records import Kind, Record
from tests.journal.helpers import scalar

EVERY_KIND = [
    Record(Kind.SCALAR, "loss", 1, 1.5, 0.25, None, 0, 1, 1, 0),
    Record(Kind.HISTOGRAM, "grad", 1, 2.5, None, b"{}", 3, 2, 2, 1),
    Record(Kind.TEXT, "note ü 🎉", 2**40, 3.5, None, "ü".encode(), 0, 1, 3, 2),
    Record(Kind.IMAGE, "digits", 0, 0.0, None, b"\x89PNG\x00\xff", 0, 1, 4, 3),
    Record(Kind.PARAM, "lr", -1, -1.5, None, b"", 0, 1, 5, 4),
    Record(Kind.ATTEMPT, "attempt", -1, 1.7e9, None, None, 0, 1, 0, 5),
    Record(Kind.SCALAR, "big", 7, 1e300, 1e308, None, 0, 1, 2**62, 6),
]


def test_records_come_back_as_they_were():
    back = schema.records_of_table(schema.table_of(EVERY_KIND))
    assert back == EVERY_KIND
    assert all(type(record.kind) is Kind for record in back)


def test_none_and_not_a_number_stay_apart():
    records = [scalar(1, math.nan), scalar(2, math.inf), scalar(3)._replace(value=None)]
    values = [record.value for record in schema.records_of_table(schema.table_of(records))]
    assert math.isnan(values[0])
    assert values[1:] == [math.inf, None]


def test_no_records_are_an_empty_table():
    assert schema.table_of([]).schema == schema.SCHEMA
    assert schema.records_of_table(schema.table_of([])) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", "three"),
        ("value", "0.5"),
        ("data", 3),
        ("key", None),
        ("key", "\ud800"),
        ("step", 2**63),
        ("rank", None),
    ],
)
def test_a_value_that_does_not_fit_names_its_column(field, value):
    with pytest.raises(JournalError, match=field):
        schema.table_of([scalar(1)._replace(**{field: value})])


def test_a_kind_of_a_newer_version_is_refused_by_name():
    table = schema.table_of([scalar(1)._replace(kind="hologram")])
    with pytest.raises(JournalError, match="hologram"):
        schema.records_of_table(table)
