from __future__ import annotations

import time

import pytest

from ray_tracking.errors import UsageError
from ray_tracking.monitoring.compare import compare, differences, flatten
from ray_tracking.runs.store import RunStore
from tests.monitoring.builder import RunBuilder, scalars


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [1]}}, "e": {}, "f": None}) == {
        "a.b": 1, "a.c.d": [1], "e": {}, "f": None
    }  # fmt: skip


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        ([{"lr": 1}, {"lr": 1}], {}),
        ([{"lr": 1, "x": 0}, {"lr": 2, "x": 0}], {"lr": (1, 2)}),
        ([{"p": {"lr": 1}}, {"p": {}}, {"p": {"lr": 1}}], {"p": (None, {}, None), "p.lr": (1, None, 1)}),
        ([{"lr": 1}, {"lr": 1}, {"lr": 3}], {"lr": (1, 1, 3)}),
    ],
)
def test_differences(configs: list[dict[str, object]], expected: dict[str, object]) -> None:
    assert differences(configs) == expected


def test_compare_puts_runs_in_the_order_asked_for(store: RunStore) -> None:
    RunBuilder(store, "a").log(scalars([1, 2])).config({"params": {"lr": 0.1}})
    RunBuilder(store, "b").log(scalars([1, 2, 4])).log(scalars([4], key="acc")).config({"params": {"lr": 0.2}})

    result = compare(store, ["b", "a"], time.time())

    assert result.runs == ("b", "a")
    assert result.last_step == (4, 2)
    assert result.config == {"params.lr": (0.2, 0.1)}
    assert result.metrics["val/loss"] == ({"last": 0.25, "best": 0.25}, {"last": 0.5, "best": 0.5})
    assert result.metrics["acc"] == ({"last": 0.25, "best": 0.25}, None)


def test_a_run_that_is_not_there(store: RunStore) -> None:
    RunBuilder(store, "a")
    with pytest.raises(UsageError, match="No run 'b'"):
        compare(store, ["a", "b"], time.time())
