"""Which params of a space a population's trials may change while they train. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ray_tracking.config.sweep_space import GRID, Constant, Distribution, Group, Node, Options


def mutable(tree: Group) -> Mapping[str, Node]:
    """Dotted name -> distribution, or choice of values. Not grids, and not params that exist in some trials only."""
    return dict(_mutable(tree, ""))


def bounded(node: Node) -> bool:
    """Whether the param is a number between two ends, of which there are no steps: what PB2 can model."""
    return isinstance(node, Distribution) and node.kind in ("uniform", "loguniform")


def _mutable(node: Group, prefix: str) -> Iterator[tuple[str, Node]]:
    for key, item in node.items.items():
        name = f"{prefix}{key}"
        if isinstance(item, Group):
            yield from _mutable(item, f"{name}.")
        elif isinstance(item, Distribution) or (
            isinstance(item, Options)
            and item.kind != GRID
            and all(isinstance(option, Constant) for option in item.options)
        ):
            yield name, item
