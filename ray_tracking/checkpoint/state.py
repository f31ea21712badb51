"""Taking the state of live objects into memory, and putting a loaded state back into them.

In: objects with `state_dict()`/`load_state_dict()` or plain state. Out: `Snapshot`, copies that training
can't change any more.
No I/O. Runs on the training thread; a snapshot may then be written from any thread.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ray_tracking.checkpoint.codec import Encoded, encode_state
from ray_tracking.checkpoint.loaded import TrainingCheckpoint
from ray_tracking.checkpoint.manifest import MODEL_FILE, tensor_file
from ray_tracking.checkpoint.rng import capture_rng, restore_rng
from ray_tracking.checkpoint.tensors import stage
from ray_tracking.errors import CheckpointError, MetricError, UsageError
from ray_tracking.log import get_logger

PER_RANK = frozenset({"loader"})
"""Objects whose state is each rank's own; all others are replicated and written by rank 0."""
RNG = "rng"
"""The name the random states are stored under; no object may have it."""

_log = get_logger()


@dataclass(frozen=True, slots=True)
class TensorFile:
    """Staged tensors of one safetensors file, and the names tied to one of them (left out name -> stored
    name).
    """

    tensors: Mapping[str, torch.Tensor]
    aliases: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One rank's part of a checkpoint, in CPU memory, sharing nothing with the live objects.

    `trees`: per object its file of tensors and JSON tree. `sequence` orders checkpoints (the step, unless
    given);
    `save_id` must be the same on every rank of one save.
    """

    step: int
    epoch: int
    rank: int
    world_size: int
    metrics: Mapping[str, float]
    sequence: int
    save_id: str
    trees: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, TensorFile] = field(repr=False)


def unwrap(model: Any) -> Any:
    """The module inside DistributedDataParallel, DataParallel and torch.compile wrappers."""
    while True:
        if isinstance(model, (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)):
            model = model.module
        elif type(model).__name__ == "OptimizedModule" and hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def capture(
    objects: Mapping[str, Any],
    *,
    step: int,
    epoch: int = 0,
    metrics: Mapping[str, Any] | None = None,
    rank: int = 0,
    world_size: int = 1,
    include_rng: bool = True,
    sequence: int | None = None,
    save_id: str = "",
) -> Snapshot:
    """Copy the state of `objects` ({"model": ..., "optimizer": ..., "loader": ...}; None is left out).

    Call it on every rank with the same objects: rank 0 takes all of them, the others only what is their own
    (the random states and `PER_RANK`). Raises CheckpointError naming the path of a value that can't be
    stored,
    before anything is copied; MetricError for a metric that is no number.
    """
    if not 0 <= rank < world_size or step < 0:
        raise UsageError(f"A checkpoint of step {step} by rank {rank} of {world_size} can't be: count ranks from 0.")
    if RNG in objects:
        raise UsageError(f"An object can't be saved as {RNG!r}: the random states have that name.")
    chosen = {name: value for name, value in objects.items() if value is not None and (rank == 0 or name in PER_RANK)}
    states = {name: _state_of(name, value) for name, value in chosen.items()}
    if include_rng:
        states[RNG] = capture_rng()
    encoded: dict[str, Encoded] = {}
    if "model" in states:
        encoded[MODEL_FILE] = encode_state(states.pop("model"))
    encoded[tensor_file(rank)] = encode_state(states)
    rest = encoded[tensor_file(rank)].tree
    trees = {name: {"file": tensor_file(rank), "tree": tree} for name, tree in rest.items()}
    if MODEL_FILE in encoded:
        trees["model"] = {"file": MODEL_FILE, "tree": encoded[MODEL_FILE].tree}
    return Snapshot(
        step=step,
        epoch=epoch,
        rank=rank,
        world_size=world_size,
        metrics=_numbers(metrics or {}),
        sequence=step if sequence is None else sequence,
        save_id=save_id,
        trees=trees,
        files={name: TensorFile(stage(part.tensors), part.aliases) for name, part in encoded.items() if part.tensors},
    )


def _state_of(name: str, value: Any) -> Any:
    if name.startswith("$") or not name:
        raise UsageError(f"An object can't be saved under the name {name!r}.", hint="Use a plain word.")
    value = unwrap(value)
    return value.state_dict() if hasattr(value, "state_dict") else value


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    numbers = {}
    for key, value in metrics.items():
        try:
            numbers[str(key)] = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise MetricError(
                f"The checkpoint's metric {key!r} is no number: {value!r:.100}",
                hint="Give one number per metric.",
            ) from error
    return numbers


def restore(checkpoint: TrainingCheckpoint, objects: Mapping[str, Any], *, rng: bool = True) -> None:
    """Put the loaded state into `objects`, in place (None is left out); other states of the checkpoint are
    ignored.

    With `rng` the random states are set last, if the checkpoint has them for this rank. Everything that can
    be is checked
    before the first object changes: CheckpointError names a missing object or the parameters that do not fit.
    """
    wanted = {name: unwrap(value) for name, value in objects.items() if value is not None}
    where = f"The checkpoint of step {checkpoint.step} ({checkpoint.path})"
    for name, value in wanted.items():
        if name not in checkpoint.objects:
            raise CheckpointError(
                f"{where} has no state for {name!r}; it holds: {', '.join(sorted(checkpoint.objects)) or 'nothing'}.",
                hint=f"Restore without {name}=, or save it with the checkpoint.",
            )
        if not hasattr(value, "load_state_dict"):
            raise UsageError(f"{name!r} is a {type(value).__name__} without load_state_dict(): it can't be restored.")
    fitted = {name: checkpoint.objects[name] for name in wanted}
    for name, value in wanted.items():
        if isinstance(value, torch.nn.Module):
            fitted[name] = fit_module(value, fitted[name], f"{where}: {name!r}")
    for name, value in wanted.items():
        _load(value, fitted[name], f"{where}: {name!r}")
    if rng and checkpoint.rng is not None:
        restore_rng(checkpoint.rng)
    elif rng:
        _log.warning("random states left as they are: the checkpoint has none for this rank", step=checkpoint.step)


def fit_module(module: torch.nn.Module, state: Any, where: str) -> Any:
    """`state` as `module` wants it (a `module.` prefix of DDP removed); CheckpointError naming what does
    not fit.
    """
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{where}: the stored state is a {type(state).__name__}, not a module's state.")
    own = module.state_dict()
    if state and all(str(key).startswith("module.") for key in state) and not any(key in own for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} is {list(value.shape)} in the checkpoint and {list(own[key].shape)} in the module"
        for key, value in state.items()
        if key in own and hasattr(value, "shape") and hasattr(own[key], "shape") and value.shape != own[key].shape
    ]
    problems = shapes + [f"{key} is not in the checkpoint" for key in missing]
    problems += [f"{key} is not in the module" for key in unexpected]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointError(
            f"{where} does not fit: {shown}.", hint="Build the module with the arguments it was trained with."
        )
    return state


def _load(value: Any, state: Any, where: str) -> None:
    # Optimizers keep the tensors they are given and change them in place: the loaded checkpoint must stay
    # what it was.
    own = state if isinstance(value, torch.nn.Module) else copy.deepcopy(state)
    try:
        value.load_state_dict(own)
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{where} could not take its state: {error}") from error
