"""What users log: converted, or refused with the key named."""

from __future__ import annotations

import io
import math
import warnings
from collections import OrderedDict
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ray_tracking.errors import MetricError
from ray_tracking.records import Histogram
from ray_tracking.tracking import values


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.5, 1.5),
        (3, 3.0),
        (True, 1.0),
        (2**63 + 1, float(2**63 + 1)),
        (-(10**400), -math.inf),
        (10**400, math.inf),
        (math.inf, math.inf),
        (np.float32(0.5), 0.5),
        (np.int64(7), 7.0),
        (np.bool_(True), 1.0),
        (np.array(2.5), 2.5),
        (np.array([[2.5]]), 2.5),
        (torch.tensor(0.25), 0.25),
        (torch.tensor([3], dtype=torch.int8), 3.0),
        (torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True), 0.5),
        (Decimal("0.125"), 0.125),
        (Fraction(1, 4), 0.25),
    ],
)
def test_numbers(value: Any, expected: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = values.scalars({"k": value})
    assert found == {"k": expected}
    assert type(found["k"]) is float


def test_not_a_number_is_a_number() -> None:
    assert math.isnan(values.scalars({"k": math.nan})["k"])


@pytest.mark.parametrize(
    "value", [None, "0.5", b"1", [1.0], (), torch.zeros(2), np.zeros((2, 2)), 1j, np.array(["a"]), object(), {1, 2}]
)
def test_what_is_no_number_is_named(value: Any) -> None:
    with pytest.raises(MetricError, match="'outer/bad' is no number"):
        values.scalars({"good": 1.0, "outer": {"bad": value}})


@pytest.mark.parametrize("metrics", [None, 0.5, [("loss", 1.0)], "loss"])
def test_no_mapping(metrics: Any) -> None:
    with pytest.raises(MetricError, match="mapping"):
        values.scalars(metrics)


def test_nested_and_odd_keys() -> None:
    nested = {"a": {"b": {"c": 1}}, 3: 2.0, ("x", 1): 3.0, "empty": {}, "p": MappingProxyType({"q": 4})}
    assert values.scalars(nested) == {"a/b/c": 1.0, "3": 2.0, "('x', 1)": 3.0, "p/q": 4.0}
    assert values.scalars({}) == {}
    assert values.scalars(OrderedDict(z=1, a=2)) == {"z": 1.0, "a": 2.0}


@pytest.mark.parametrize(("step", "expected"), [(3, 3), (np.int32(3), 3), (torch.tensor(3), 3), (4.0, 4), (-1, -1)])
def test_steps(step: Any, expected: int) -> None:
    assert values.step(step) == expected
    assert type(values.step(step)) is int


@pytest.mark.parametrize("step", [None, 1.5, "3", 2**63, -(2**63) - 1, math.nan, math.inf, [1], torch.zeros(2)])
def test_what_is_no_step(step: Any) -> None:
    with pytest.raises(MetricError, match="no whole number of 64 bits"):
        values.step(step)


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(3, 4, requires_grad=True),
        torch.randn(5, dtype=torch.bfloat16),
        np.arange(7, dtype=np.int8),
        [1, 2, 2.5],
        [1e308, -1e308],
        [1e16, 1e16 + 2],
        [5e-324, 1e-323],
        [7.0, 7.0],
        np.array([True, False]),
    ],
)
def test_histogram_counts_every_finite_value(value: Any) -> None:
    found = Histogram.decode(values.histogram("h", value))
    assert sum(found.counts) == np.asarray(values.array("h", value)).size
    assert len(found.edges) == len(found.counts) + 1
    assert all(low < high for low, high in zip(found.edges, found.edges[1:], strict=False))


def test_histogram_leaves_out_what_is_not_finite() -> None:
    found = Histogram.decode(values.histogram("h", [math.nan, math.inf, -math.inf, 1.0, 3.0]))
    assert (sum(found.counts), found.total, found.total_squares) == (2, 4.0, 10.0)
    assert sum(Histogram.decode(values.histogram("h", [])).counts) == 0


@pytest.mark.parametrize("value", [["a"], [None], torch.zeros(2, dtype=torch.complex64), object()])
def test_histogram_of_no_numbers_names_the_key(value: Any) -> None:
    with pytest.raises(MetricError, match="'grad'"):
        values.histogram("grad", value)


@pytest.mark.parametrize(
    ("value", "mode", "pixel"),
    [
        (np.full((2, 5), 255, np.uint8), "L", 255),
        (np.full((2, 5), 1.0), "L", 255),
        (np.full((2, 5, 3), 0.5, np.float32), "RGB", (128, 128, 128)),
        (torch.zeros(3, 2, 5), "RGB", (0, 0, 0)),
        (torch.ones(1, 2, 5), "L", 255),
        (np.full((2, 5, 1), 300), "L", 255),
        (np.full((2, 5), np.nan), "L", 0),
        (np.ones((2, 5), bool), "L", 255),
        (Image.new("CMYK", (5, 2), (0, 0, 0, 0)), "RGB", (255, 255, 255)),
        (Image.new("F", (5, 2), 0.0), "RGB", (0, 0, 0)),
    ],
)
def test_image(value: Any, mode: str, pixel: Any) -> None:
    with Image.open(io.BytesIO(values.image("i", value))) as found:
        assert (found.format, found.mode, found.size, found.getpixel((0, 0))) == ("PNG", mode, (5, 2), pixel)


@pytest.mark.parametrize("shape", [(4,), (2, 2, 2), (0, 3), (1, 3, 4, 4)])
def test_image_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(MetricError, match="'grid' has shape"):
        values.image("grid", np.zeros(shape))


def test_text_is_cut_with_a_mark() -> None:
    assert values.text("é\ud800") == "é?".encode()
    long = values.text("x" * (values.MAX_TEXT + 7)).decode()
    assert long.startswith("x" * values.MAX_TEXT)
    assert long.endswith("[cut: 7 more characters]")
