"""Placing points in rows whose step only grows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ray_tracking.tracking.backends.wandb_rows import Rows


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(-2, 12)), max_size=60), st.integers(-1, 5))
def test_nothing_is_dropped_and_every_step_can_be_read(points: list[tuple[str, int]], start: int) -> None:
    rows, table, last = Rows(start), [], start
    for key, step in points:
        position, companion = rows.place(key, step)
        assert position >= last
        last = position
        table.append((position, key, companion, step))
        assert companion is not None or position == step
    names = [(position, name) for position, key, companion, _ in table for name in (key, companion) if name]
    assert len(names) == len(set(names))


def test_the_normal_case_is_one_row_per_step() -> None:
    rows = Rows()
    assert [rows.place(key, step) for step in (1, 2) for key in "ab"] == [(1, None), (1, None), (2, None), (2, None)]


def test_rows_go_on_after_the_last_one_that_was_taken() -> None:
    rows = Rows(3, ["a"])
    assert rows.reached(3, ["b"]).place("a", 3) == (4, "a@step")
    assert rows.reached(3, ["b"]).place("c", 3) == (3, None)
    assert rows.reached(5, ["b"]).place("a", 5) == (5, None)
