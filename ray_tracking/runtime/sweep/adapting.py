"""Optimizers that were given another trial's state keep it, but train on with the hyperparameters they were built with.

In: what a training function gives to `run.restore`. Out: param groups with the rates of this trial's params.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

Groups = list[dict[str, Any]]


def built_with(objects: Mapping[str, Any]) -> dict[str, Groups]:
    """By name, the hyperparameters of the optimizers among the objects, before anything is loaded into them."""
    return {
        name: [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        for name, optimizer in objects.items()
        if isinstance(optimizer, torch.optim.Optimizer)
    }


def adapt(objects: Mapping[str, Any], built: Mapping[str, Groups]) -> None:
    """After loading. A rate that a scheduler has moved keeps its place on the schedule: it is scaled."""
    for name, groups in built.items():
        optimizer = objects[name]
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group.update(_adapted(group, before))
    for scheduler in objects.values():
        if hasattr(scheduler, "base_lrs") and hasattr(scheduler, "optimizer"):
            groups = scheduler.optimizer.param_groups
            scheduler.base_lrs = [group.get("initial_lr", group["lr"]) for group in groups]
            scheduler._last_lr = [group["lr"] for group in groups]


def _adapted(loaded: Mapping[str, Any], built: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in built.items() if key in loaded}
    base = loaded.get("initial_lr")
    if base:
        wanted = built.get("initial_lr", built["lr"])
        found |= {"initial_lr": wanted, "lr": loaded["lr"] * (wanted / base)}
    return found
