"""When to save and what to keep: pure rules over steps, metrics and `CheckpointInfo`s.

In: numbers and infos. Out: a reason to save, a list to delete. No I/O, no clock, no torch.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ray_tracking.checkpoint.manifest import CheckpointInfo
from ray_tracking.errors import ConfigError

NOT_RULES = frozenset({"checkpoint_dir", "compression", "encryption"})
"""Keys of the same section that say where and how to store, not when."""


@dataclass(frozen=True, slots=True)
class CheckpointStrategy:
    """Saving and retention of one run's checkpoints. Raises ConfigError when the rules contradict
    themselves.
    """

    save_steps: int | None = 1000
    """Save at every multiple of this step; None: only by the other rules."""
    save_total_limit: int | None = 3
    """How many to keep, the latest and the best among them (both are kept even at 1); None: all."""
    save_best_only: bool = False
    """Of what is due, save only what improves the monitor; without a finite value of it nothing is saved."""
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

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise _bad("mode", self.mode, "min or max")
        if not isinstance(self.monitor, str) or not self.monitor:
            raise _bad("monitor", self.monitor, "a metric's name")
        for key in ("save_steps", "save_total_limit", "keep_every_steps"):
            value = getattr(self, key)
            if value is not None and (type(value) is not int or value < 1):
                raise _bad(key, value, "a whole number of at least 1, or null")
        seconds = self.save_every_seconds
        if seconds is not None and not (
            isinstance(seconds, (int, float)) and not isinstance(seconds, bool) and 0 < seconds < math.inf
        ):
            raise _bad("save_every_seconds", seconds, "a number of seconds above 0, or null")
        for key in ("save_best_only", "save_on_epoch_end"):
            if type(getattr(self, key)) is not bool:
                raise _bad(key, getattr(self, key), "true or false")
        if self.save_steps is None and seconds is None and not self.save_on_epoch_end:
            raise ConfigError(
                "The checkpoint strategy never saves: save_steps and save_every_seconds are null and "
                "save_on_epoch_end is false.",
                hint="Set at least one of them, such as save_steps: 1000.",
            )

    @classmethod
    def from_config(cls, section: Any) -> CheckpointStrategy:
        """From `training.default`: a mapping, a pydantic model or None (all defaults). An unknown key is a
        ConfigError.
        """
        values = as_mapping(section)
        known = {item.name for item in fields(cls)}
        for key in values:
            if key not in known | NOT_RULES:
                near = difflib.get_close_matches(key, known | NOT_RULES, n=1)
                raise ConfigError(
                    f"Unknown key {key!r} in the checkpoint section"
                    + (f"; did you mean {near[0]!r}?" if near else "."),
                    hint=f"Allowed: {', '.join(sorted(known | NOT_RULES))}.",
                )
        return cls(**{key: value for key, value in values.items() if key in known})

    def should_save(
        self,
        step: int,
        metric: float | None = None,
        *,
        best_so_far: float | None = None,
        last_saved_step: int | None = None,
        seconds_since_last: float = 0.0,
        epoch_end: bool = False,
    ) -> str | None:
        """Why a checkpoint is due after `step`, or None. `metric` is the monitor's value at this step, if
        there is one.
        """
        if step < 1 or step == last_saved_step:
            return None
        reason = None
        if self.save_steps is not None and step % self.save_steps == 0:
            reason = f"every {self.save_steps} steps"
        elif self.save_every_seconds is not None and seconds_since_last >= self.save_every_seconds:
            reason = f"every {self.save_every_seconds:g} seconds"
        elif self.save_on_epoch_end and epoch_end:
            reason = "end of epoch"
        if reason is None or not self.save_best_only:
            return reason
        return f"{reason}, best {self.monitor}" if self.improves(metric, best_so_far) else None

    def improves(self, metric: float | None, best_so_far: float | None) -> bool:
        """Whether `metric` is strictly better; NaN, infinities and None never are."""
        if metric is None or not math.isfinite(metric):
            return False
        if best_so_far is None or not math.isfinite(best_so_far):
            return True
        return metric < best_so_far if self.mode == "min" else metric > best_so_far

    def ranked(self, infos: Iterable[CheckpointInfo]) -> list[CheckpointInfo]:
        """Those with a finite monitor, best first; of equals the newer first."""
        sign = 1.0 if self.mode == "min" else -1.0
        scored = [info for info in infos if math.isfinite(info.metrics.get(self.monitor, math.nan))]
        newest_first = sorted(scored, key=lambda info: info.order, reverse=True)
        return sorted(newest_first, key=lambda info: sign * info.metrics[self.monitor])

    def best(self, infos: Iterable[CheckpointInfo]) -> CheckpointInfo | None:
        ranked = self.ranked(infos)
        return ranked[0] if ranked else None

    def to_delete(self, infos: Sequence[CheckpointInfo]) -> list[CheckpointInfo]:
        """What retention removes, oldest first. Never the latest, the best, a pinned one or a multiple of
        keep_every_steps.
        """
        if self.save_total_limit is None or not infos:
            return []
        newest_first = sorted(infos, key=lambda info: info.order, reverse=True)
        best = self.best(infos)
        always = {newest_first[0].folder} | ({best.folder} if best else set())
        ordinary = [info for info in newest_first if not info.pinned and not self._for_ever(info)]
        room = self.save_total_limit - sum(info.folder in always for info in ordinary)
        candidates = [info for info in ordinary if info.folder not in always]
        return candidates[max(room, 0) :][::-1]

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


def _bad(key: str, found: object, allowed: str) -> ConfigError:
    return ConfigError(f"{key}: found {found!r}; allowed: {allowed}.", hint=f"Set training.default.{key}.")
