"""How `checkpoints show` prints what a checkpoint contains."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ray_tracking.cli import output

if TYPE_CHECKING:
    from rich.console import Console

    from ray_tracking.monitoring.inside import Inside


def print_inside(screen: Console, view: Inside, *, every: bool) -> None:
    """Facts, metrics, states, tensors (in groups unless `every`) and files."""
    line = view.line
    saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(line.created))
    facts = [
        ("step", line.step),
        ("epoch", line.epoch),
        ("where", view.path),
        ("saved", f"{saved}, {output.duration(time.time() - line.created)} ago"),
        ("because", line.reason or None),
        ("marks", ", ".join(line.marks) or None),
        ("ranks", line.world_size),
        ("size", output.size(line.bytes) + (f", {output.size(line.raw_bytes)} unsealed" if line.sealed else "")),
        ("compression", line.compression),
        ("encryption", f"{line.encryption}, for {', '.join(line.keys)}" if line.encryption else None),
        ("save", view.save_id or None),
        ("plan", view.plan or None),
        ("schema", view.schema),
    ]
    screen.print(output.facts(facts))
    if line.metrics:
        screen.print()
        screen.print(output.table("Metrics", ("metric", "value"), sorted(line.metrics.items()), right=("value",)))
    states = [
        (
            state.name,
            "each its own" if state.ranks else "all the same" if line.world_size > 1 else "",
            state.tensors,
            state.items,
            None if state.bytes is None else output.size(state.bytes),
            f"{state.shared} tied" if state.shared else "",
        )
        for state in view.states
    ]
    screen.print()
    columns = ("state", "ranks" if line.world_size > 1 else "", "tensors", "numbers", "size", "")
    screen.print(output.table("States", columns, states, right=("tensors", "numbers", "size")))
    if view.hidden:
        screen.print()
        screen.print(output.cell(f"Its tensors are not shown. {view.hidden}"))
    elif view.tensors:
        _print_tensors(screen, view, every)
    screen.print()
    if line.sealed:
        sealed = [(one.name, output.size(one.bytes), output.size(one.raw_bytes), one.digest) for one in view.files]
        screen.print(
            output.table("Files", ("file", "size", "unsealed", "xxh3-128"), sealed, right=("size", "unsealed"))
        )
    else:
        files = [(file.name, output.size(file.bytes), file.digest) for file in view.files]
        screen.print(output.table("Files", ("file", "size", "xxh3-128"), files, right=("size",)))


def _print_tensors(screen: Console, view: Inside, every: bool) -> None:
    from ray_tracking.monitoring.inside import groups

    screen.print()
    if every:
        each = [
            (tensor.object, tensor.name, tensor.dtype, _shape(tensor.shape), output.size(tensor.bytes), tensor.rank)
            for tensor in view.tensors
        ]
        columns = ("state", "tensor", "dtype", "shape", "size", "rank")
        screen.print(output.table("Tensors", columns, each, right=("size", "rank")))
        return
    rows = [
        (group.object, group.name, group.tensors, group.dtype, _shape(group.shape), output.size(group.bytes))
        for group in groups(view.tensors)
    ]
    columns = ("state", "tensors", "count", "dtype", "shape", "size")
    screen.print(output.table("Tensors, like ones together (--tensors: each)", columns, rows, right=("count", "size")))


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) if shape else "scalar"
