from __future__ import annotations

import time

import pytest

from ray_tracking.errors import UsageError
from ray_tracking.monitoring.select import match, select_run
from ray_tracking.runs.store import RunStore
from tests.monitoring.builder import RunBuilder

IDS = ["digits-1", "digits-10", "digits-2", "faces-1"]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [("digits-1", "digits-1"), ("digits-10", "digits-10"), ("f", "faces-1"), ("digits-2", "digits-2")],
)
def test_a_full_id_wins_over_its_continuations_and_a_prefix_must_be_unambiguous(wanted: str, found: str) -> None:
    assert match(wanted, IDS, "here") == found


def test_several_candidates_are_named() -> None:
    with pytest.raises(UsageError, match="any of 3 runs: digits-1, digits-10, digits-2"):
        match("dig", IDS, "here")


@pytest.mark.parametrize("wanted", ["", "facets-1", "../faces-1"])
def test_no_candidate_says_where_it_looked(wanted: str) -> None:
    with pytest.raises(UsageError, match="in here") as caught:
        match(wanted, IDS, "here")
    assert caught.value.exit_code == 2


def test_a_near_miss_is_suggested() -> None:
    with pytest.raises(UsageError, match="Did you mean faces-1"):
        match("facets-1", IDS, "here")


def test_latest_is_the_one_created_last(store: RunStore) -> None:
    with pytest.raises(UsageError, match="There are no runs"):
        select_run(store, "latest")
    now = time.time()
    RunBuilder(store, "z", created=now - 50)
    RunBuilder(store, "a", created=now - 5)
    assert select_run(store, "latest") == "a"
    assert select_run(store, "z") == "z"
