"""A parsed search space put to use: drawn from, counted out, asked of Optuna, or as Ray Tune's own objects."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from ray import tune

from ray_tracking.config.sweep_points import matches
from ray_tracking.config.sweep_space import (
    CHOICE,
    GRID,
    SHAPES,
    Constant,
    Distribution,
    Group,
    Node,
    Options,
    walk,
)

_TUNE: dict[str, Callable[..., Any]] = {
    "uniform": tune.uniform,
    "quniform": tune.quniform,
    "loguniform": tune.loguniform,
    "qloguniform": tune.qloguniform,
    "normal": tune.randn,
    "qnormal": tune.qrandn,
    "randint": tune.randint,
    "qrandint": tune.qrandint,
    "lograndint": tune.lograndint,
    "qlograndint": tune.qlograndint,
}


def domain_of(node: Distribution) -> Any:
    """The distribution as Ray Tune's."""
    numbers = [int(number) if SHAPES[node.kind].whole else number for number in node.numbers]
    return _TUNE[node.kind](*numbers)


def as_tune(node: Node) -> Any:
    """The space as Ray Tune's own; a choice over spaces as a choice over mappings."""
    if isinstance(node, Group):
        return {key: as_tune(item) for key, item in node.items.items()}
    if isinstance(node, Options):
        return tune.choice([as_tune(option) for option in node.options])
    return domain_of(node) if isinstance(node, Distribution) else node.value


def draw(node: Node, random: np.random.RandomState, grid: Mapping[int, Node] | None = None) -> Any:
    """Params drawn from the space; of each grid, the option that `grid` names by its identity."""
    if isinstance(node, Group):
        return {key: draw(item, random, grid) for key, item in node.items.items()}
    if isinstance(node, Options):
        if node.kind == GRID:
            return draw((grid or {})[id(node)], random, grid)
        return draw(node.options[int(random.randint(len(node.options)))], random, grid)
    return plain(domain_of(node).sample(random_state=random)) if isinstance(node, Distribution) else node.value


def grids(tree: Group) -> list[Mapping[int, Node]]:
    """Every combination of the grids' options, the last grid varying fastest; one empty one without grids."""
    found = [node for _, node in walk(tree) if isinstance(node, Options) and node.kind == GRID]
    combinations = itertools.product(*(node.options for node in found))
    return [{id(node): option for node, option in zip(found, chosen, strict=True)} for chosen in combinations]


def plain(value: Any) -> Any:
    """Numbers and text of NumPy, which searchers like to give, as Python's own."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


# --- Optuna: a value is asked for by its path; `a/choice` is the number of the option ------------------------------


def ask(node: Node, trial: Any, path: str = "") -> Any:
    """Params that an Optuna trial proposes: params of an option are only asked for if the choice falls on it."""
    if isinstance(node, Group):
        return {key: ask(item, trial, _below(path, key)) for key, item in node.items.items()}
    if isinstance(node, Options):
        name = _below(path, CHOICE)
        index = trial.suggest_categorical(name, list(range(len(node.options))))
        return ask(node.options[index], trial, _below(name, str(index)))
    return _ask_number(node, trial, path) if isinstance(node, Distribution) else node.value


def _ask_number(node: Distribution, trial: Any, path: str) -> float | int:
    shape = SHAPES[node.kind]
    low, high, *steps = node.numbers
    if node.kind in ("randint", "lograndint"):
        high -= 1
    step = steps[0] if steps else None
    value: float
    if shape.whole:
        plain_step = step if step is not None and not shape.log else 1
        value = trial.suggest_int(path, int(low), int(high), step=int(plain_step), log=shape.log)
    else:
        value = trial.suggest_float(path, low, high, step=None if shape.log else step, log=shape.log)
    if step is not None and shape.log:  # Optuna takes no steps on a logarithm: rounded here, as Tune does
        value = min(max(round(value / step) * step, low), high)
    return int(value) if shape.whole else float(value)


def named(node: Node, value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """A point of the space by the names that `ask` uses."""
    if isinstance(node, Group):
        for key, item in node.items.items():
            if not isinstance(item, Constant):
                yield from named(item, value[key], _below(path, key))
    elif isinstance(node, Options):
        name = _below(path, CHOICE)
        index = next(index for index, option in enumerate(node.options) if matches(option, value))
        yield name, index
        yield from named(node.options[index], value, _below(name, str(index)))
    elif isinstance(node, Distribution):
        yield path, int(value) if SHAPES[node.kind].whole else float(value)


def completed(node: Node, value: Any) -> Any:
    """A point with the constants of the space that it left out."""
    if isinstance(node, Group):
        return {
            key: completed(item, value[key]) if key in value else item.value  # type: ignore[union-attr]
            for key, item in node.items.items()
        }
    if isinstance(node, Options):
        option = next((each for each in node.options if matches(each, value)), None)
        return value if option is None else completed(option, value)
    return value


def _below(path: str, key: str) -> str:
    return f"{path}/{key}" if path else key
