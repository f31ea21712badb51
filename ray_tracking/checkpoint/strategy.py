"""When to save and what to keep: pure rules over steps, metrics and `CheckpointInfo`s.

In: numbers and infos. Out: a reason to save, the reasons to keep, a list to delete. No I/O, no clock, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ray_tracking.checkpoint.manifest import CheckpointInfo
from ray_tracking.config import CheckpointConfig
from ray_tracking.config import section as validated
from ray_tracking.errors import ConfigError


@dataclass(frozen=True, slots=True)
class CheckpointStrategy:
    """Saving and retention of one run's checkpoints. Raises ConfigError for what `CheckpointConfig` refuses: values
    that can't be, and rules that contradict each other.
    """

    save_steps: int | None = 1000
    """Save at every multiple of this step; None: only by the other rules."""
    save_total_limit: int | None = 3
    """How many to keep, the latest and the best among them (both are kept even at 1); None: all. A rule only while
    keep_last and keep_best are None: beside them it must hold by itself, or be 3, the default, which then gives way.
    """
    save_best_only: bool = False
    """Of what is due, save only what improves the monitor, and what `should_save` calls a resume point. Then the other
    rules keep improvements only, and of resume points the newest checkpoint of all is kept."""
    monitor: str = "val_loss"
    """The metric, as saved with the checkpoint, that tells the best."""
    mode: str = "min"
    """Whether a lower ("min") or a higher ("max") monitor is better."""
    save_every_seconds: float | None = None
    """Also save when this much time has passed since the last save (or since the start)."""
    keep_every_steps: int | None = None
    """Keep every checkpoint at a multiple of this step for ever; those do not count for save_total_limit."""
    save_on_epoch_end: bool = False
    """Also save at each epoch's end."""
    save_on_preemption: bool = True
    """Also save when the machine or the run is told to stop."""
    save_on_exception: bool = True
    """Also save when the training function raises."""
    save_at_end: bool = True
    """Also save when the training function has ended."""
    keep_last: int | None = None
    """Keep this many of the newest; None: no such rule."""
    keep_best: int | None = None
    """Keep this many of the best by the monitor; None: no such rule."""

    def __post_init__(self) -> None:
        given = {item.name: getattr(self, item.name) for item in fields(self)}
        checked = validated(CheckpointConfig, given, key="CheckpointStrategy")
        for name in given:  # 1e3 and NumPy's numbers have become Python's own
            object.__setattr__(self, name, checked[name])

    @classmethod
    def from_config(cls, section: Any) -> CheckpointStrategy:
        """From `training.default`: a mapping, a pydantic model or None (all defaults). An unknown key is a
        ConfigError; keys that say where and how to store are left aside.
        """
        values = as_mapping(section)
        checked = validated(CheckpointConfig, values)
        return cls(**{item.name: checked[item.name] for item in fields(cls) if item.name in values})

    def should_save(
        self,
        step: int,
        metric: float | None = None,
        *,
        best_so_far: float | None = None,
        last_saved_step: int | None = None,
        seconds_since_last: float = 0.0,
        epoch_end: bool = False,
        preempted: bool = False,
        failed: bool = False,
        ended: bool = False,
        resume_points: bool = False,
    ) -> str | None:
        """Why a checkpoint is due after `step`, or None. `metric` is the monitor's value at this step, if
        there is one.

        `preempted`, `failed`, `ended`: training was told to stop, raised, is over. `resume_points`: under
        save_best_only what is due and no improvement is saved as well, to resume from.
        """
        if step < 1 or step == last_saved_step:
            return None
        reason = None
        if self.save_on_preemption and preempted:
            reason = "preemption"
        elif self.save_on_exception and failed:
            reason = "exception"
        elif self.save_at_end and ended:
            reason = "end of training"
        elif self.save_steps is not None and step % self.save_steps == 0:
            reason = f"every {self.save_steps} steps"
        elif self.save_every_seconds is not None and seconds_since_last >= self.save_every_seconds:
            reason = f"every {self.save_every_seconds:g} seconds"
        elif self.save_on_epoch_end and epoch_end:
            reason = "end of epoch"
        if reason is None or not self.save_best_only:
            return reason
        if self.improves(metric, best_so_far):
            return f"{reason}, best {self.monitor}"
        return f"{reason}, resume point" if resume_points else None

    def improves(self, metric: float | None, best_so_far: float | None) -> bool:
        """Whether `metric` is strictly better; NaN, infinities and None never are."""
        if metric is None or not math.isfinite(metric):
            return False
        if best_so_far is None or not math.isfinite(best_so_far):
            return True
        return metric < best_so_far if self.mode == "min" else metric > best_so_far

    def ranked(self, infos: Iterable[CheckpointInfo]) -> list[CheckpointInfo]:
        """Those with a finite monitor, best first; of equals the newer first.

        Under save_best_only a resume point that only equals an improvement comes after it: it was not saved for
        its value.
        """
        sign = 1.0 if self.mode == "min" else -1.0
        scored = [info for info in infos if math.isfinite(info.metrics.get(self.monitor, math.nan))]
        return sorted(
            _newest_first(scored),
            key=lambda info: (sign * info.metrics[self.monitor], self.save_best_only and not info.improved),
        )

    def best(self, infos: Iterable[CheckpointInfo]) -> CheckpointInfo | None:
        ranked = self.ranked(infos)
        return ranked[0] if ranked else None

    def keeps(self, infos: Iterable[CheckpointInfo]) -> dict[str, tuple[str, ...]]:
        """Why each checkpoint stays, by folder, the newest first; () for those that go.

        A checkpoint stays if any rule wants it. `infos` are those a store lists: one per step.
        """
        newest_first = _newest_first(infos)
        best = self.best(newest_first)
        always = [("latest", newest_first[:1]), ("best", [best] if best else [])]
        for_ever = [
            ("pinned", [info for info in newest_first if info.pinned]),
            (f"every {self.keep_every_steps} steps", [info for info in newest_first if self._for_ever(info)]),
        ]
        pool = [info for info in newest_first if info.improved or not self.save_best_only]
        if self.keep_last is not None or self.keep_best is not None:
            counted = [
                (f"last {self.keep_last}", pool[: self.keep_last or 0]),
                (f"best {self.keep_best}", self.ranked(pool)[: self.keep_best or 0]),
            ]
        elif self.save_total_limit is None:
            counted = [("no limit", pool)]
        else:
            apart = {info.folder for _, wanted in for_ever for info in wanted}
            taken = {info.folder for _, wanted in always for info in wanted} - apart
            room = max(self.save_total_limit - len(taken), 0)
            free = [info for info in pool if info.folder not in apart | taken]
            counted = [(f"within the limit of {self.save_total_limit}", free[:room])]
        reasons: dict[str, tuple[str, ...]] = {info.folder: () for info in newest_first}
        for name, wanted in [*always, *for_ever, *counted]:
            for info in wanted:
                reasons[info.folder] += (name,)
        return reasons

    def to_delete(self, infos: Sequence[CheckpointInfo]) -> list[CheckpointInfo]:
        """What retention removes, oldest first. Never the latest, the best, a pinned one or a multiple of
        keep_every_steps.
        """
        reasons = self.keeps(infos)
        return [info for info in reversed(_newest_first(infos)) if not reasons[info.folder]]

    def _for_ever(self, info: CheckpointInfo) -> bool:
        return self.keep_every_steps is not None and info.step % self.keep_every_steps == 0


def as_mapping(section: Any) -> Mapping[str, Any]:
    """A config section as a mapping: None is empty, a pydantic model is dumped."""
    if section is None:
        return {}
    if hasattr(section, "model_dump"):
        dumped: dict[str, Any] = section.model_dump()
        return dumped
    if isinstance(section, Mapping):
        return section
    raise ConfigError(
        f"A config section is a {type(section).__name__}, not a mapping.",
        hint="Pass config['training']['default'].",
    )


def _newest_first(infos: Iterable[CheckpointInfo]) -> list[CheckpointInfo]:
    return sorted(infos, key=lambda info: info.order, reverse=True)
