"""Which parts can be struck here: before anything starts.

In: the parts that were asked for, the run's configuration. Out: those that can be struck, and why others can't.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec

from ray_tracking.config import Config
from ray_tracking.errors import RefusedError, UsageError
from ray_tracking.storage import Storage
from ray_tracking.testing.chaos.plan import BACKENDS, GROUPS, Part, unfold
from ray_tracking.testing.chaos.tmpfs import why_no_tmpfs


def parts_of(text: str) -> tuple[list[Part], list[Part]]:
    """What `--kinds` says: parts by their own name, and parts that a word for several stands for. Raises UsageError."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    try:
        named, grouped = unfold(words)
    except ValueError:
        wrong = next(word for word in words if word not in GROUPS and word not in list(Part))
        raise UsageError(
            f"--kinds: {wrong!r} is nothing that can be struck.",
            hint=f"Allowed, with commas between: {', '.join(Part)}; {', '.join(GROUPS)} for several.",
        ) from None
    if not named and not grouped:
        raise UsageError("--kinds names nothing.", hint=f"Allowed, with commas between: {', '.join((*Part, *GROUPS))}.")
    return named, grouped


def choose(
    named: Sequence[Part], grouped: Sequence[Part], config: Config, storage: Storage, *, own_storage: bool
) -> tuple[list[Part], Mapping[Part, str]]:
    """(what will be struck, what will not although a group means it, and why).

    `own_storage`: the runs lie in a folder that chaos has made. Raises RefusedError for what was named and can't be
    struck here, or if nothing is left.
    """
    obstacles = {
        part: why for part in (*named, *grouped) if (why := _why_not(part, config, storage, own_storage=own_storage))
    }
    chosen = [part for part in (*named, *grouped) if part not in obstacles]
    refused = [part for part in named if part in obstacles] or ([] if chosen else list(obstacles))
    if refused:
        raise RefusedError(
            "\n".join(f"{part.value} can't be struck here: {obstacles[part]}" for part in refused),
            hint=f"Choose others with --kinds: {', '.join(Part)}.",
        )
    return chosen, {part: obstacles[part] for part in grouped if part in obstacles}


def _why_not(part: Part, config: Config, storage: Storage, *, own_storage: bool) -> str | None:
    if part in (Part.NODE, Part.HEAD) and config.scaling.use_gpu:
        return (
            "it needs several Ray nodes on this machine, which can't share its GPUs. Try it on CPUs "
            "(--set scaling.use_gpu=false), or kill nodes of a real cluster by hand and `ray-tracking resume`."
        )
    if part is Part.DISK:
        if not own_storage:
            return "it needs a disk of its own for the runs, in memory. Leave out --storage."
        why = why_no_tmpfs()
        return None if why is None else f"a disk in memory (tmpfs) can't be mounted. {why} Run it as root."
    return _why_no_backend(part, config, storage, own_storage=own_storage) if part in BACKENDS else None


def _why_no_backend(part: Part, config: Config, storage: Storage, *, own_storage: bool) -> str | None:
    name = part.value
    if find_spec(name) is None:
        return f'it is not installed: pip install "ray-tracking[{name}]".'
    tracking = config.experiment_tracking
    if not tracking.enabled or not tracking[name]["enabled"]:
        return f"the run does not use it: --set experiment_tracking.{name}.enabled=true."
    if part is Part.WANDB and tracking.wandb.mode != "offline":
        return "only its files can be taken away, and read back: --set experiment_tracking.wandb.mode=offline."
    if part is Part.MLFLOW:
        return None
    if not storage.is_local:
        return f"its files must lie in a local folder, not on {storage.uri}. Leave out --storage."
    if part is Part.TENSORBOARD and "://" in (tracking.tensorboard.log_dir or ""):
        return "its files must lie in a local folder: --set experiment_tracking.tensorboard.log_dir=null."
    if part is Part.WANDB and not own_storage and storage.exists("wandb"):
        return f"its folder {storage.path('wandb')} has files of other runs. Leave out --storage, or give an empty one."
    return None
