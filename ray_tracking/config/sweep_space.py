"""A search space written as data: what may stand in it, and what is wrong with one that can't be searched. Pure.

In: `sweep.space`, nested mappings whose values are params or distributions, such as `{loguniform: [1e-5, 1e-1]}`.
Out: a tree of Group, Distribution, Options and Constant; or the problems, each with its path, what was found and what
is allowed there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple

Path = tuple[str, ...]


class Shape(NamedTuple):
    """What a distribution takes: the names of its numbers, whether they are whole, and how it spreads."""

    arguments: tuple[str, ...]
    whole: bool = False
    log: bool = False


SHAPES: Mapping[str, Shape] = {
    "uniform": Shape(("low", "high")),
    "quniform": Shape(("low", "high", "q")),
    "loguniform": Shape(("low", "high"), log=True),
    "qloguniform": Shape(("low", "high", "q"), log=True),
    "normal": Shape(("mean", "sd")),
    "qnormal": Shape(("mean", "sd", "q")),
    "randint": Shape(("low", "high"), whole=True),
    "qrandint": Shape(("low", "high", "q"), whole=True),
    "lograndint": Shape(("low", "high"), whole=True, log=True),
    "qlograndint": Shape(("low", "high", "q"), whole=True, log=True),
}
"""The distributions of numbers. The high end of randint and lograndint is left out, that of the others is in."""
TUNE_NAMES = {"randn": "normal", "qrandn": "qnormal", "grid_search": "grid"}
"""What Ray Tune calls some of them."""
CHOICE, GRID = "choice", "grid"
WORDS = (*SHAPES, CHOICE, GRID)


@dataclass(frozen=True, slots=True)
class Constant:
    """A value that is the same in every trial."""

    value: Any


@dataclass(frozen=True, slots=True)
class Distribution:
    """One of SHAPES with its numbers."""

    kind: str
    numbers: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Options:
    """`choice` (one is drawn) or `grid` (each is tried). An option may be a space of its own."""

    kind: str
    options: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """A mapping of params."""

    items: Mapping[str, Node]


Node = Constant | Distribution | Options | Group


class Problem(NamedTuple):
    """`path` is relative to the space."""

    path: Path
    found: Any
    allowed: str


def parse(space: Mapping[str, Any]) -> tuple[Group, list[Problem]]:
    """The space as a tree, and what is wrong with it; the tree is only good if nothing is."""
    problems: list[Problem] = []
    if not space:
        problems.append(Problem((), space, "at least one param, such as lr: {loguniform: [1e-5, 1e-1]}"))
    return _group(space, (), problems), problems


def walk(node: Node, path: Path = ()) -> Iterator[tuple[Path, Node]]:
    """Every node with its path; of options, those that are spaces, under their number."""
    yield path, node
    if isinstance(node, Group):
        for key, item in node.items.items():
            yield from walk(item, (*path, key))
    elif isinstance(node, Options):
        for index, option in enumerate(node.options):
            if not isinstance(option, Constant):
                yield from walk(option, (*path, node.kind, str(index)))


def is_conditional(node: Node) -> bool:
    """Whether the node is a choice of which some params hang: they exist only if it falls on their option."""
    return isinstance(node, Options) and any(not isinstance(option, Constant) for option in node.options)


def _group(space: Mapping[Any, Any], path: Path, problems: list[Problem]) -> Group:
    items = {}
    for key, value in space.items():
        if not isinstance(key, str) or not key:
            problems.append(Problem((*path, str(key)), key, "names of params that are text; quote the name"))
            continue
        items[key] = _node(value, (*path, key), problems)
    return Group(items)


def _node(value: Any, path: Path, problems: list[Problem]) -> Node:
    if not isinstance(value, Mapping):
        return Constant(value)
    if not value:
        problems.append(Problem(path, value, "a value, a distribution, or a mapping with params in it"))
        return Constant(value)
    names = {key: TUNE_NAMES.get(str(key), str(key)) for key in value}
    said = [key for key in value if names[key] in WORDS and isinstance(value[key], list | tuple)]
    if not said:
        _refuse_misspelt(value, path, problems)
        return _group(value, path, problems)
    if len(value) > 1:
        problems.append(Problem(path, value, f"a distribution alone: {{{said[0]}: [...]}} without other keys"))
        return Constant(value)
    key = said[0]
    if names[key] in (CHOICE, GRID):
        return _options(names[key], value[key], (*path, str(key)), problems)
    return _distribution(names[key], value[key], (*path, str(key)), problems)


def _refuse_misspelt(value: Mapping[Any, Any], path: Path, problems: list[Problem]) -> None:
    """A mapping with one key that nearly is a distribution is none of params."""
    if len(value) != 1:
        return
    [(key, content)] = value.items()
    name = TUNE_NAMES.get(str(key), str(key))
    close = get_close_matches(name.lower(), WORDS, n=1, cutoff=0.8)
    if name in WORDS:
        problems.append(Problem((*path, str(key)), content, _form(name)))
    elif close and isinstance(content, list | tuple):
        problems.append(
            Problem(path, value, f"a distribution ({', '.join(WORDS)}) or params; did you mean {close[0]}?")
        )


def _options(kind: str, values: Sequence[Any], path: Path, problems: list[Problem]) -> Node:
    if not values:
        problems.append(Problem(path, values, "a list with at least one option"))
    options = []
    for index, value in enumerate(values):
        option = _node(value, (*path, str(index)), problems)
        nested = any(isinstance(node, Options) and node.kind == GRID for _, node in walk(option))
        if nested or (kind == GRID and any(isinstance(node, Distribution | Options) for _, node in walk(option))):
            problems.append(Problem((*path, str(index)), value, f"an option of {kind} without a grid or draw in it"))
            option = Constant(value)
        elif isinstance(option, Group) and all(isinstance(n, Constant | Group) for _, n in walk(option)):
            option = Constant(value)
        options.append(option)
    return Options(kind, tuple(options))


def _form(kind: str) -> str:
    if kind in (CHOICE, GRID):
        return f"{{{kind}: [option, option, ...]}}"
    return f"{{{kind}: [{', '.join(SHAPES[kind].arguments)}]}}, numbers"


def _distribution(kind: str, given: Sequence[Any], path: Path, problems: list[Problem]) -> Node:
    shape = SHAPES[kind]
    numbers = [float(value) if _is_number(value) else None for value in given]
    wrong = _wrong(kind, shape, numbers)
    if wrong:
        problems.append(Problem(path, list(given), wrong))
        return Constant(given)
    return Distribution(kind, tuple(number for number in numbers if number is not None))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _wrong(kind: str, shape: Shape, numbers: list[float | None]) -> str | None:
    """What is allowed instead; None if the numbers make a distribution."""
    if len(numbers) != len(shape.arguments) or None in numbers:
        return _form(kind)
    values = dict(zip(shape.arguments, [number for number in numbers if number is not None], strict=True))
    if shape.whole and not all(value.is_integer() for value in values.values()):
        return f"whole numbers: {_form(kind)}"
    q = values.get("q")
    if q is not None and q <= 0:
        return f"a q above 0: {_form(kind)}"
    if "sd" in values:
        return None if values["sd"] > 0 else f"an sd above 0: {_form(kind)}"
    low, high = values["low"], values["high"]
    if low >= high:
        return f"a low end below the high end: {_form(kind)}"
    if shape.log and low <= 0:
        return f"a low end above 0, of which there is a logarithm: {_form(kind)}"
    if q is not None and not (_fits(low, q) and _fits(high, q)):
        return f"ends that are multiples of q ({q:g}): {_form(kind)}"
    return None


def _fits(end: float, q: float) -> bool:
    return math.isclose(end / q, round(end / q), rel_tol=0, abs_tol=1e-6)
