from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_tracking.monitoring.report.params import Axis, axes, flat, number_axis

SPACE = {
    "lr": {"loguniform": [1e-4, 1e-1]},
    "layers": {"randint": [1, 7]},
    "noise": {"normal": [0, 1]},
    "width": {"choice": [64, 16]},
    "optimizer": {"choice": [{"kind": "adam"}, {"kind": "sgd", "momentum": {"uniform": [0, 0.9]}}]},
}
TRIALS = [
    {"lr": 1e-3, "layers": 3, "noise": -2.0, "width": 16, "optimizer": {"kind": "adam"}, "extra": "x"},
    {"lr": 1e-2, "layers": 5, "noise": 1.0, "width": 16, "optimizer": {"kind": "sgd", "momentum": 0.5}},
]


def test_axes_are_those_of_the_space_and_then_what_trials_have_besides() -> None:
    found = axes(SPACE, [flat(trial) for trial in TRIALS])
    assert found == [
        Axis("lr", "log", 1e-4, 1e-1),
        Axis("layers", "linear", 1, 7),
        Axis("noise", "linear", -2, 1),
        Axis("width", "category", categories=("16", "64")),
        Axis("optimizer.kind", "category", categories=("adam", "sgd")),
        Axis("optimizer.momentum", "linear", 0, 0.9),
        Axis("extra", "category", categories=("x",)),
    ]


@pytest.mark.parametrize("space", [{}, {"lr": {"from_the_future": [1, 2]}}, {"lr": {"loguniform": [3]}}])
def test_a_space_that_cannot_be_read_costs_the_scale_alone(space: dict[str, object]) -> None:
    assert axes(space, [{"lr": 0.5}, {"lr": 2}]) == [Axis("lr", "linear", 0.5, 2)]


def test_places() -> None:
    assert Axis("lr", "log", 1e-4, 1e-2).place(1e-3) == pytest.approx(0.5)
    assert Axis("n", "linear", 2, 4).place(3) == 0.5
    assert Axis("n", "linear", 2, 2).place(2) == 0.5
    assert [Axis("k", "category", categories=("a", "b", "c")).place(kind) for kind in "abc"] == [0, 0.5, 1]
    assert Axis("k", "category", categories=("a",)).place("a") == 0.5


@given(
    st.sampled_from(["log", "linear"]),
    st.floats(1e-9, 1e9),
    st.floats(1.001, 1e6),
)
def test_ticks_lie_on_the_axis_and_are_few(scale: str, low: float, factor: float) -> None:
    ticks = Axis("n", scale, low, low * factor).ticks()  # type: ignore[arg-type]
    assert 2 <= len(ticks) <= 7 or factor < 1.1
    assert all(-1e-6 <= place <= 1 + 1e-6 for place, _ in ticks)
    assert [place for place, _ in ticks] == sorted(place for place, _ in ticks)


def test_a_metric_over_more_than_two_decades_is_logarithmic() -> None:
    assert number_axis("loss", [0.01, 2.0]).scale == "log"
    assert number_axis("loss", [0.01, 0.5]).scale == "linear"
    assert number_axis("loss", [-1, 500]).scale == "linear"
