"""Points to try first, held against the space that they are points of. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray_tracking.config.sweep_space import SHAPES, Constant, Distribution, Group, Node, Options, Path, Problem


def problems_of(space: Group, point: Mapping[str, Any]) -> list[Problem]:
    """What keeps `point` from being a point of the space: paths are relative to the point."""
    return list(_problems(space, point, ()))


def matches(node: Node, value: Any) -> bool:
    """Whether the node can give the value."""
    return not _problems(node, value, ())


def _problems(node: Node, value: Any, path: Path) -> list[Problem]:
    if isinstance(node, Group):
        return _of_group(node, value, path)
    if isinstance(node, Constant):
        return [] if value == node.value else [Problem(path, value, f"{node.value!r}, as in the space, or left out")]
    if isinstance(node, Options):
        if any(not _problems(option, value, path) for option in node.options):
            return []
        return [Problem(path, value, f"one of the options of {node.kind} in the space")]
    return [] if within(node, value) else [Problem(path, value, f"a value of {node.kind} {list(node.numbers)}")]


def _of_group(node: Group, value: Any, path: Path) -> list[Problem]:
    if not isinstance(value, Mapping):
        return [Problem(path, value, "a mapping with the keys " + ", ".join(node.items))]
    found = [
        Problem((*path, str(key)), item, "the params of the space: " + ", ".join(node.items))
        for key, item in value.items()
        if key not in node.items
    ]
    for key, item in node.items.items():
        if key in value:
            found += _problems(item, value[key], (*path, key))
        elif not isinstance(item, Constant):
            found.append(Problem((*path, key), None, "a value: a point names every param that the space draws"))
    return found


def within(node: Distribution, value: Any) -> bool:
    """Whether the distribution can give the value (its steps of q not looked at)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    shape = SHAPES[node.kind]
    if shape.whole and not float(value).is_integer():
        return False
    if "sd" in shape.arguments:
        return True
    low, high = node.numbers[:2]
    return low <= value < high if node.kind in ("randint", "lograndint") else low <= value <= high
