"""Whether a cluster's nodes can hold the workers of a run and its driver. Pure: no ray.

In: what each node has, what each worker and the driver need. Out: what is missing, in words, or a UsageError.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ray_tracking.config import ScalingConfig
from ray_tracking.errors import UsageError

_ROUNDING = 1e-6
_FIX = (
    "Use fewer workers (--set scaling.workers=N), smaller scaling.resources_per_worker, another place for the driver "
    "(submit: --driver-...), or more nodes."
)


@dataclass(frozen=True, slots=True)
class Node:
    """One living node. `resources` is all that it has, used or not; `host` its address."""

    node_id: str
    host: str
    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DriverPlace:
    """What the job's driver asks for; nothing: Ray runs it on the head. `labels` as in Ray: `a`, `!a`, `in(a, b)`."""

    cpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def needs(self) -> dict[str, float]:
        cpus = {"CPU": self.cpus} if self.cpus else {}
        return {**cpus, **self.resources}

    @property
    def is_anywhere(self) -> bool:
        """Nothing was asked for."""
        return not self.needs and not self.labels


def per_worker(scaling: ScalingConfig) -> dict[str, float]:
    """What Ray Train reserves for each worker, its own defaults included."""
    each = dict(scaling.resources_per_worker) or ({} if scaling.use_gpu else {"CPU": 1.0})
    if scaling.use_gpu:
        each["GPU"] = max(each.get("GPU", 0.0), 1.0)
    return {name: amount for name, amount in each.items() if amount > 0}


def total(nodes: Iterable[Node]) -> dict[str, float]:
    """The sum over the nodes."""
    result: dict[str, float] = {}
    for node in nodes:
        for name, amount in node.resources.items():
            result[name] = result.get(name, 0.0) + amount
    return result


def check_capacity(scaling: ScalingConfig, nodes: Sequence[Node], driver: DriverPlace | None = None) -> None:
    """Raise UsageError if the nodes can't hold the workers beside the driver, whatever else runs there now."""
    missing = unfit(scaling, nodes, driver)
    if missing:
        raise UsageError(f"The cluster can't hold the run: {'; '.join(missing)}.", hint=_FIX)


def lacking(scaling: ScalingConfig, available: Mapping[str, float]) -> list[str]:
    """What the workers need in all and the cluster has not, in words."""
    needed = {name: amount * scaling.workers for name, amount in per_worker(scaling).items()}
    who = "1 worker needs" if scaling.workers == 1 else f"{scaling.workers} workers need"
    return [
        f"{who} {amount:g} {name}, it has {available.get(name, 0):g}"
        for name, amount in needed.items()
        if amount > available.get(name, 0) + _ROUNDING
    ]


def places(each: Mapping[str, float], node: Node) -> int:
    """How many workers a node can hold; a worker is never spread over two."""
    if not each:
        return 1_000_000
    return min(max(int(node.resources.get(name, 0.0) / amount + _ROUNDING), 0) for name, amount in each.items())


def holders(scaling: ScalingConfig, nodes: Iterable[Node]) -> list[Node]:
    """The nodes that can get a worker."""
    each = per_worker(scaling)
    return [node for node in nodes if places(each, node)]


def unfit(scaling: ScalingConfig, nodes: Sequence[Node], driver: DriverPlace | None = None) -> list[str]:
    """Why the workers (beside the driver, if it is still to be placed) can't be held, in words; empty if they can."""
    missing = lacking(scaling, total(nodes))
    if missing:
        return missing
    each = per_worker(scaling)
    best = sum(places(each, node) for node in nodes)
    if driver is not None and not driver.is_anywhere:
        takers = [node for node in nodes if _takes(driver, node)]
        if not takers:
            return [f"no node can take the driver ({_described(driver)})"]
        best = max(best - places(each, node) + places(each, _less(node, driver)) for node in takers)
    if best >= scaling.workers:
        return []
    wants = ", ".join(f"{amount:g} {name}" for name, amount in each.items())
    beside = " beside the driver" if driver is not None and driver.needs else ""
    return [f"its {len(nodes)} nodes have room for {best} of {scaling.workers} workers of {wants} each{beside}"]


def label_matches(wanted: str, found: str | None) -> bool:
    """Ray's label selectors: `value`, `!value`, `in(a, b)`, `!in(a, b)`. A missing label matches negations."""
    text = wanted.strip()
    negated = text.startswith("!")
    text = text.removeprefix("!").strip()
    if text.startswith("in(") and text.endswith(")"):
        allowed = {value.strip() for value in text[3:-1].split(",")}
    else:
        allowed = {text}
    return (found in allowed) != negated


def _takes(driver: DriverPlace, node: Node) -> bool:
    enough = all(node.resources.get(name, 0.0) + _ROUNDING >= amount for name, amount in driver.needs.items())
    return enough and all(label_matches(value, node.labels.get(key)) for key, value in driver.labels.items())


def _less(node: Node, driver: DriverPlace) -> Node:
    left = {name: amount - driver.needs.get(name, 0.0) for name, amount in node.resources.items()}
    return replace(node, resources=left)


def _described(driver: DriverPlace) -> str:
    needs = [f"{amount:g} {name}" for name, amount in driver.needs.items()]
    return ", ".join([*needs, *(f"label {key}={value}" for key, value in driver.labels.items())])
