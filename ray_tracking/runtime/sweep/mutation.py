"""New params out of those of a better trial: each one of the space is moved a little, or drawn anew. Pure.

In: the space, params, a generator of random numbers. Out: params that are points of the space.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from ray_tracking.config.sweep_population import mutable
from ray_tracking.config.sweep_space import SHAPES, Distribution, Group, Node, Options
from ray_tracking.runtime.sweep.space import draw, plain

_FACTORS = (0.8, 1.2)


def mutated(
    tree: Group,
    params: Mapping[str, Any],
    names: Collection[str],
    random: np.random.RandomState,
    resample_probability: float,
) -> dict[str, Any]:
    """`params` with those of `names` (dotted) changed, as the population's paper has it."""
    changed: dict[str, Any] = dict(params)
    for name, node in mutable(tree).items():
        if name in names:
            value = read(changed, name)
            again = random.random_sample() < resample_probability
            changed = written(changed, name, draw(node, random) if again else _moved(node, value, random))
    return changed


def read(params: Mapping[str, Any], name: str) -> Any:
    """The value of a dotted name."""
    value: Any = params
    for part in name.split("."):
        value = value[part]
    return value


def written(params: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """A copy with the value of a dotted name replaced."""
    first, _, rest = name.partition(".")
    return {**params, first: written(params[first], rest, value) if rest else value}


def _moved(node: Node, value: Any, random: np.random.RandomState) -> Any:
    if isinstance(node, Options):
        options = [draw(option, random) for option in node.options]  # constants: nothing is drawn
        index = options.index(value) + int(random.choice((-1, 1)))
        return options[min(max(index, 0), len(options) - 1)]
    assert isinstance(node, Distribution)
    up = bool(random.random_sample() < 0.5)
    found = into(node, value * _FACTORS[up])
    if found == value and SHAPES[node.kind].whole:  # rounding has moved it nowhere
        found = into(node, value + (1 if up else -1) * step_of(node))
    return found


def step_of(node: Distribution) -> float:
    """The distance between two values next to each other; 0 if there is none."""
    return node.numbers[-1] if "q" in SHAPES[node.kind].arguments else float(SHAPES[node.kind].whole)


def into(node: Distribution, value: float) -> Any:
    """The value that the distribution can give, nearest to `value`."""
    shape, step = SHAPES[node.kind], step_of(node)
    found = round(value / step) * step if step else float(value)
    if "low" in shape.arguments:
        low, high = node.numbers[:2]
        if node.kind in ("randint", "lograndint"):
            high -= 1
        found = min(max(found, low), high)
    return plain(int(found) if shape.whole else float(found))
