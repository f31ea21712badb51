from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_tracking.checkpoint.manifest import CheckpointInfo
from ray_tracking.checkpoint.strategy import CheckpointStrategy
from ray_tracking.config import get_config
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
    ("event", "option", "reason"),
    [
        ("preempted", "save_on_preemption", "preemption"),
        ("failed", "save_on_exception", "exception"),
        ("ended", "save_at_end", "end of training"),
    ],
)
def test_saves_when_training_ends_in_any_way(event: str, option: str, reason: str) -> None:
    rules = CheckpointStrategy(save_steps=10)
    assert rules.should_save(7, **{event: True}) == reason
    assert rules.should_save(10, **{event: True}) == reason, "the rarer reason is the one to be told"
    assert rules.should_save(7, last_saved_step=7, **{event: True}) is None
    assert rules.should_save(0, **{event: True}) is None
    off = CheckpointStrategy(save_steps=10, **{option: False})  # type: ignore[arg-type]
    assert off.should_save(7, **{event: True}) is None
    assert off.should_save(10, **{event: True}) == "every 10 steps"


def test_best_only_leaves_resume_points_where_they_are_asked_for() -> None:
    rules = CheckpointStrategy(save_steps=10, save_best_only=True)
    assert rules.should_save(10, 0.4, best_so_far=0.5, resume_points=True) == "every 10 steps, best val_loss"
    assert rules.should_save(10, 0.6, best_so_far=0.5, resume_points=True) == "every 10 steps, resume point"
    assert rules.should_save(10, None, resume_points=True) == "every 10 steps, resume point"
    assert rules.should_save(7, math.nan, preempted=True, resume_points=True) == "preemption, resume point"
    assert rules.should_save(7, 0.6, best_so_far=0.5, ended=True) is None
    assert rules.should_save(9, 0.4, resume_points=True) is None, "not due is not due"
    ordinary = CheckpointStrategy(save_steps=10)
    assert ordinary.should_save(10, resume_points=True) == "every 10 steps"


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
        {"save_at_end": 1},
        {"keep_last": 0},
        {"keep_best": -2},
        {"monitor": None, "keep_best": 2},
        {"monitor": "", "save_best_only": True},
        {"save_total_limit": 4, "keep_last": 4},
        {"save_steps": None, "save_on_preemption": False, "save_on_exception": False, "save_at_end": False},
    ],
)
def test_a_strategy_that_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        CheckpointStrategy(**options)
    with pytest.raises(ConfigError, match=rf"training\.default.*{next(iter(options))}"):
        CheckpointStrategy.from_config(options)


def test_from_config() -> None:
    section = {"save_steps": 7, "monitor": "val/loss", "checkpoint_dir": None, "compression": None}
    assert CheckpointStrategy.from_config(section) == CheckpointStrategy(save_steps=7, monitor="val/loss")
    assert CheckpointStrategy.from_config(None) == CheckpointStrategy()
    with pytest.raises(ConfigError, match=r"Did you mean training\.default\.save_steps"):
        CheckpointStrategy.from_config({"save_step": 7})
    with pytest.raises(ConfigError, match=r"training\.default\.when_busy: found"):
        CheckpointStrategy.from_config({"when_busy": "maybe"})
    assert CheckpointStrategy(save_steps=1e3).save_steps == 1000  # type: ignore[arg-type]


def test_the_packaged_section_is_a_strategy_with_the_same_defaults() -> None:
    packaged = get_config("production").training.default
    assert CheckpointStrategy.from_config(packaged) == CheckpointStrategy(monitor="val/loss")
    assert CheckpointStrategy.from_config(packaged.model_copy(update={"keep_last": 5})).keep_last == 5


@pytest.mark.parametrize(
    ("limit", "last", "best", "fits"),
    [
        (3, 50, 50, True),
        (None, 50, 50, True),
        (8, 5, 3, True),
        (7, 5, 3, False),
        (6, 5, None, True),
        (5, 5, None, False),
        (4, None, 3, True),
        (2, None, 2, False),
        (1, None, None, True),
    ],
)
def test_a_limit_must_hold_what_the_other_rules_keep(
    limit: int | None, last: int | None, best: int | None, fits: bool
) -> None:
    """3 is what the packaged file says: whoever sets keep_last need not take it back."""
    options = {"save_total_limit": limit, "keep_last": last, "keep_best": best}
    for make in (CheckpointStrategy.from_config, lambda given: CheckpointStrategy(**given)):
        if fits:
            assert make(options).save_total_limit == limit
        else:
            with pytest.raises(ConfigError, match=f"save_total_limit of at least .* instead of {limit}, or null"):
                make(options)


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
    assert steps(rules.to_delete([*infos, info(140, pinned=True)])) == [110, 120], "not even the latest"


def test_a_later_attempt_is_newer_whatever_its_step() -> None:
    old = CheckpointInfo(120, "attempt-001/step-000120", attempt=1, sequence=120)
    new = CheckpointInfo(100, "attempt-002/step-000100", attempt=2, sequence=100)
    assert CheckpointStrategy(save_total_limit=1).to_delete([new, old]) == [old]


def test_nan_is_never_best_and_ties_go_to_the_newer() -> None:
    rules = CheckpointStrategy()
    infos = [info(1, 0.5), info(2, math.nan), info(3, 0.5), info(4), info(5, -math.inf)]
    assert steps(rules.ranked(infos)) == [3, 1]
    assert rules.best([info(1, math.nan), info(2)]) is None


def test_keeps_the_last_and_the_best_of_them() -> None:
    infos = [info(10, 0.1), info(20, 0.2), info(30, 0.5), info(40, 0.4), info(50, 0.3)]
    assert steps(CheckpointStrategy(keep_last=2).to_delete(infos)) == [20, 30]
    assert steps(CheckpointStrategy(keep_best=2).to_delete(infos)) == [30, 40]
    assert steps(CheckpointStrategy(keep_last=2, keep_best=2).to_delete(infos)) == [30]
    assert steps(CheckpointStrategy(keep_last=1, keep_best=1, mode="max").to_delete(infos)) == [10, 20, 40]
    assert CheckpointStrategy(keep_last=1, keep_best=1, keep_every_steps=10).to_delete(infos) == []
    assert steps(CheckpointStrategy(save_total_limit=None, keep_last=1).to_delete(infos)) == [20, 30, 40]


def test_why_each_is_kept() -> None:
    infos = [info(10, 0.1), info(20, 0.2, pinned=True), info(30, 0.5), info(100, 0.4), info(110, 0.3)]
    assert CheckpointStrategy(keep_last=2, keep_best=2, keep_every_steps=100).keeps(infos) == {
        "step-000110": ("latest", "last 2"),
        "step-000100": ("every 100 steps", "last 2"),
        "step-000030": (),
        "step-000020": ("pinned", "best 2"),
        "step-000010": ("best", "best 2"),
    }
    limited = CheckpointStrategy(save_total_limit=3).keeps(infos)
    assert limited["step-000110"] == ("latest",)
    assert limited["step-000100"] == ("within the limit of 3",)
    assert limited["step-000030"] == ()
    assert set(CheckpointStrategy(save_total_limit=None).keeps(infos).values()) >= {("no limit",)}


def test_best_only_keeps_improvements_and_the_newest_of_all() -> None:
    rules = CheckpointStrategy(save_best_only=True, save_total_limit=3)
    first = [info(1, 0.5, improved=True), info(2, 0.6), info(3, 0.4, improved=True), info(4, 0.3, improved=True)]
    assert steps(rules.to_delete(first)) == [2]
    assert steps(rules.to_delete([*first, info(5, 0.7), info(6)])) == [1, 2, 5]
    tied = info(5, 0.3)
    assert rules.best([*first, tied]) == first[3], "a resume point that is only as good was not saved for its value"
    assert steps(rules.to_delete([*first, tied, info(6, 0.9)])) == [1, 2, 5]
    last = CheckpointStrategy(save_best_only=True, keep_last=1)
    assert steps(last.to_delete([*first, info(5, 0.7)])) == [1, 2, 3]


@st.composite
def strategies(draw: st.DrawFn, *, best_only: bool | None = None) -> CheckpointStrategy:
    """Any valid strategy."""
    counts = st.none() | st.integers(1, 4)
    last, best = draw(st.just((None, None)) | st.tuples(counts, counts))
    limits: st.SearchStrategy[int | None] = st.integers(1, 5) | st.none()
    if last or best:
        limits = st.sampled_from([None, 3, (last or 1) + (best or 1)])
    return CheckpointStrategy(
        save_total_limit=draw(limits),
        keep_last=last,
        keep_best=best,
        keep_every_steps=draw(st.none() | st.integers(1, 5)),
        mode=draw(st.sampled_from(["min", "max"])),
        save_best_only=draw(st.booleans()) if best_only is None else best_only,
    )


values = st.one_of(st.none(), st.floats(), st.sampled_from([0.0, 1.0, 2.0]))
events = st.lists(
    st.tuples(values, st.booleans(), st.booleans(), st.sampled_from([-3, 1, 1, 1, 2])), min_size=1, max_size=25
)
"""(monitor, pinned, improved, how far training goes; backwards begins a new attempt)."""


def saved(series: list[tuple[float | None, bool, bool, int]]) -> Iterator[CheckpointInfo]:
    attempt, step = 1, 0
    for value, pinned, improved, move in series:
        attempt, step = attempt + (move < 0), max(step + move, 1)
        metrics = {} if value is None else {"val_loss": value}
        folder = f"attempt-{attempt:03d}/step-{step:06d}"
        yield CheckpointInfo(
            step, folder, attempt=attempt, sequence=step, metrics=metrics, pinned=pinned, improved=improved
        )


def beats(rules: CheckpointStrategy, new: CheckpointInfo, old: CheckpointInfo | None) -> bool:
    """Whether a newer checkpoint takes the place of the best, written down apart from the code under test."""
    value = new.metrics.get("val_loss", math.nan)
    if not math.isfinite(value):
        return False
    if old is None:
        return True
    before = old.metrics["val_loss"]
    if value == before:
        return new.improved or not old.improved or not rules.save_best_only
    return value < before if rules.mode == "min" else value > before


@settings(max_examples=300)
@given(events, strategies())
def test_whatever_is_saved_the_invariants_hold(
    series: list[tuple[float | None, bool, bool, int]], rules: CheckpointStrategy
) -> None:
    """Run saves and retention one after the other, as a training run would."""
    kept: list[CheckpointInfo] = []
    best: CheckpointInfo | None = None
    for new in saved(series):
        superseded = [each for each in kept if each.step == new.step]
        before = [*(each for each in kept if each.step != new.step), new]
        if best in superseded:
            best = None
            for each in before:  # oldest first
                best = each if beats(rules, each, best) else best
        elif beats(rules, new, best):
            best = new

        gone = rules.to_delete(before)
        assert gone == sorted(gone, key=lambda each: each.order)
        assert gone == rules.to_delete(before[::-1]), "the order in which they are listed plays no part"
        kept = [each for each in before if each not in gone]
        assert rules.to_delete(kept) == [], "a second pass finds nothing"
        assert kept[-1] == new, "the latest is kept"
        assert rules.best(before) == rules.best(kept) == best, "the best of all is known and kept"
        special = [each for each in before if each.pinned or each.step % (rules.keep_every_steps or math.inf) == 0]
        assert not set(steps(special)) & set(steps(gone))

        counted = [each for each in kept if each not in special]
        if rules.keep_last or rules.keep_best:
            assert len(counted) <= (rules.keep_last or 1) + (rules.keep_best or 1) + 2 * rules.save_best_only
        elif rules.save_total_limit:
            assert len(counted) <= max(rules.save_total_limit, 2)
        else:
            assert rules.save_best_only or not gone
        if not rules.save_best_only:
            assert not set(steps(before[-(rules.keep_last or 1) :])) & set(steps(gone))
            assert not set(steps(rules.ranked(before)[: rules.keep_best or 1])) & set(steps(gone))
            if gone and not (rules.keep_last or rules.keep_best):
                assert len(counted) >= (rules.save_total_limit or 0), "the limit is made use of"


@given(st.lists(st.tuples(values, st.booleans()), min_size=1, max_size=25), strategies(best_only=True))
def test_best_only_leaves_one_resume_point_at_most(
    series: list[tuple[float | None, bool]], rules: CheckpointStrategy
) -> None:
    kept: list[CheckpointInfo] = []
    best_ever: float | None = None
    improvements = 0
    for step, (value, pinned) in enumerate(series, start=1):
        improved = rules.improves(value, best_ever)
        if improved:
            best_ever = value
            improvements += 1
        kept.append(info(step, value, pinned=pinned, improved=improved))
        gone = rules.to_delete(kept)
        kept = [each for each in kept if each not in gone]
        points = [
            each.step
            for each in kept
            if not each.improved and not each.pinned and each.step % (rules.keep_every_steps or math.inf) != 0
        ]
        assert points in ([], [step]), "only the newest may be one that improved nothing"
        best = rules.best(kept)
        assert (best.metrics["val_loss"] if best else None) == best_ever
        assert best is None or best.improved
        wanted = max(rules.keep_last or 0, rules.keep_best or 0)
        if wanted:
            assert sum(each.improved for each in kept) >= min(wanted, improvements)
