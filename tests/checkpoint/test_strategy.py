from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_tracking.checkpoint.manifest import CheckpointInfo
from ray_tracking.checkpoint.strategy import CheckpointStrategy
from ray_tracking.errors import ConfigError


def info(step: int, value: float | None = None, **options: Any) -> CheckpointInfo:
    metrics = {} if value is None else {"val_loss": value}
    return CheckpointInfo(step, f"step-{step:06d}", sequence=step, metrics=metrics, **options)


def steps(infos: list[CheckpointInfo]) -> list[int]:
    return [each.step for each in infos]


def test_saves_at_multiples_only() -> None:
    rules = CheckpointStrategy(save_steps=10)
    assert [step for step in range(41) if rules.should_save(step)] == [10, 20, 30, 40]
    assert rules.should_save(10) == "every 10 steps"
    assert rules.should_save(10, last_saved_step=10) is None


def test_saves_by_time_and_at_epoch_end() -> None:
    rules = CheckpointStrategy(save_steps=None, save_every_seconds=60, save_on_epoch_end=True)
    assert rules.should_save(3, seconds_since_last=59.9) is None
    assert rules.should_save(3, seconds_since_last=60.0) == "every 60 seconds"
    assert rules.should_save(3, epoch_end=True) == "end of epoch"


@pytest.mark.parametrize(
    ("mode", "metric", "best", "saves"),
    [
        ("min", 0.4, 0.5, True),
        ("min", 0.5, 0.5, False),
        ("min", 0.6, 0.5, False),
        ("max", 0.6, 0.5, True),
        ("max", 0.4, 0.5, False),
        ("min", 0.4, None, True),
        ("min", None, None, False),
        ("min", math.nan, None, False),
        ("min", -math.inf, 0.5, False),
        ("max", math.inf, 0.5, False),
        ("min", 0.4, math.nan, True),
    ],
)
def test_best_only_saves_improvements(mode: str, metric: float | None, best: float | None, saves: bool) -> None:
    rules = CheckpointStrategy(save_steps=10, save_best_only=True, mode=mode)
    assert bool(rules.should_save(20, metric, best_so_far=best)) is saves
    assert rules.should_save(21, metric, best_so_far=best) is None


@pytest.mark.parametrize(
    "options",
    [
        {"save_total_limit": 0},
        {"save_steps": 0},
        {"save_steps": 1.5},
        {"save_steps": True},
        {"mode": "lowest"},
        {"monitor": ""},
        {"save_every_seconds": 0},
        {"save_every_seconds": math.nan},
        {"save_every_seconds": "60"},
        {"keep_every_steps": -1},
        {"save_best_only": "yes"},
        {"save_steps": None},
    ],
)
def test_a_strategy_that_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        CheckpointStrategy(**options)


def test_from_config() -> None:
    section = {"save_steps": 7, "monitor": "val/loss", "checkpoint_dir": None, "compression": None}
    assert CheckpointStrategy.from_config(section) == CheckpointStrategy(save_steps=7, monitor="val/loss")
    assert CheckpointStrategy.from_config(None) == CheckpointStrategy()
    with pytest.raises(ConfigError, match="did you mean 'save_steps'"):
        CheckpointStrategy.from_config({"save_step": 7})


def test_keeps_the_newest_and_the_best() -> None:
    infos = [info(10, 0.1), info(20, 0.5), info(30, 0.4), info(40, 0.3)]
    assert steps(CheckpointStrategy(save_total_limit=3).to_delete(infos)) == [20]
    assert steps(CheckpointStrategy(save_total_limit=2).to_delete(infos)) == [20, 30]
    assert steps(CheckpointStrategy(save_total_limit=1).to_delete(infos)) == [20, 30]
    assert steps(CheckpointStrategy(save_total_limit=1, mode="max").to_delete(infos)) == [10, 30]
    assert CheckpointStrategy(save_total_limit=None).to_delete(infos) == []
    assert CheckpointStrategy().to_delete([]) == []


def test_pinned_and_every_nth_are_kept_and_do_not_count() -> None:
    infos = [info(10, pinned=True), info(100), info(110), info(120), info(130)]
    rules = CheckpointStrategy(save_total_limit=1, keep_every_steps=100)
    assert steps(rules.to_delete(infos)) == [110, 120]


def test_a_later_attempt_is_newer_whatever_its_step() -> None:
    old = CheckpointInfo(120, "attempt-001/step-000120", attempt=1, sequence=120)
    new = CheckpointInfo(100, "attempt-002/step-000100", attempt=2, sequence=100)
    assert CheckpointStrategy(save_total_limit=1).to_delete([new, old]) == [old]


def test_nan_is_never_best_and_ties_go_to_the_newer() -> None:
    rules = CheckpointStrategy()
    infos = [info(1, 0.5), info(2, math.nan), info(3, 0.5), info(4), info(5, -math.inf)]
    assert steps(rules.ranked(infos)) == [3, 1]
    assert rules.best([info(1, math.nan), info(2)]) is None


values = st.one_of(st.none(), st.floats(), st.sampled_from([0.0, 1.0]))


@given(
    st.lists(st.tuples(values, st.booleans()), min_size=1, max_size=30),
    st.integers(1, 6),
    st.sampled_from(["min", "max"]),
    st.one_of(st.none(), st.integers(1, 5)),
)
def test_whatever_is_saved_the_invariants_hold(
    saves: list[tuple[float | None, bool]], limit: int, mode: str, every: int | None
) -> None:
    """Run saves and retention one after the other, as a training run would."""
    rules = CheckpointStrategy(save_total_limit=limit, mode=mode, keep_every_steps=every)
    kept: list[CheckpointInfo] = []
    best_ever: float | None = None
    for step, (value, pinned) in enumerate(saves, start=1):
        kept.append(info(step, value, pinned=pinned))
        if rules.improves(value, best_ever):
            best_ever = value
        gone = rules.to_delete(kept)
        assert gone == sorted(gone, key=lambda each: each.order)
        kept = [each for each in kept if each not in gone]
        assert rules.to_delete(kept) == [], "a second pass finds nothing"
        assert kept[-1].step == step, "the latest is kept"
        best = rules.best(kept)
        assert (best.metrics["val_loss"] if best else None) == best_ever, "the best ever is kept"
        assert not any(each.pinned or (every and each.step % every == 0) for each in gone)
        ordinary = [each for each in kept if not each.pinned and not (every and each.step % every == 0)]
        assert len(ordinary) <= max(limit, 2)
