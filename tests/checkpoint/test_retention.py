from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_tracking.checkpoint import manifest as names
from ray_tracking.checkpoint.manifest import CheckpointInfo, FileEntry, Manifest
from ray_tracking.checkpoint.retention import apply_retention, due, explain, gc, leftovers, why_gone
from ray_tracking.checkpoint.store import CheckpointStore, Found, newest_per_step
from ray_tracking.checkpoint.strategy import CheckpointStrategy
from ray_tracking.storage import Storage

from .faults import Killed, KillingStorage, kill_points
from .test_strategy import saved, strategies, values


def info(step: int, value: float | None = None, *, attempt: int = 1, **options: Any) -> CheckpointInfo:
    folder = options.pop("folder", f"attempt-{attempt:03d}/step-{step:06d}")
    metrics = {} if value is None else {"val_loss": value}
    return CheckpointInfo(step, folder, attempt=attempt, sequence=step, metrics=metrics, **options)


def found(*items: CheckpointInfo | str) -> list[Found]:
    """Complete ones by their info, incomplete ones by `attempt/step`."""
    result = []
    for item in items:
        if isinstance(item, str):
            attempt, _, step = item.partition("/")
            result.append(Found(item, int(attempt), int(step), None, "no manifest"))
        else:
            result.append(Found(item.folder, item.attempt, item.step, item))
    return result


def put(storage: Storage, folder: str, sequence: int, metrics: Mapping[str, float], *, ranks: int = 2) -> None:
    """A checkpoint of world size 2 with one file per rank; `ranks=1` leaves it incomplete."""
    step = int(folder.rpartition("step-")[2][:6])
    for rank in range(ranks):
        data, name = b"x" * step, names.state_file(rank)
        storage.write_bytes(names.join(folder, name), data)
        files = {name: FileEntry(len(data), names.digest(data), len(data))}
        manifest = Manifest(step, 0, rank, 2, sequence, 0.0, metrics, (), files)
        storage.write_bytes(names.join(folder, names.rank_file(rank, 2)), names.encode_manifest(manifest))


def test_each_with_its_reasons() -> None:
    rules = CheckpointStrategy(keep_last=1, keep_best=1, keep_every_steps=100)
    infos = [
        info(10, 0.1),
        info(20, 0.2, pinned=True),
        info(30, 0.3),
        info(100, 0.4),
        info(30, 0.5, attempt=2),
        info(40, 0.6, attempt=2),
    ]
    assert explain(infos[::-1], rules) == [
        (infos[0], ("best", "best 1")),
        (infos[1], ("pinned",)),
        (infos[2], ()),
        (infos[3], ("every 100 steps",)),
        (infos[4], ()),
        (infos[5], ("latest", "last 1")),
    ]
    assert why_gone(infos[2], infos, rules) == "saved again later"
    assert why_gone(infos[4], infos, rules) == "beyond the last 1 and the best 1"
    assert why_gone(infos[4], infos, CheckpointStrategy(save_total_limit=2)) == "beyond the limit of 2"
    only = CheckpointStrategy(save_best_only=True, keep_best=2)
    assert why_gone(infos[4], infos, only) == "no improvement, and no longer the newest"
    assert explain([], rules) == []


def test_doubles_go_first_so_that_none_comes_to_light_again() -> None:
    """Step 20 of attempt 1 is the better one, but attempt 2 has superseded it."""
    infos = [info(20, 0.0), info(20, 0.5, attempt=2), info(30, 0.2, attempt=2), info(40, 0.4, attempt=2)]
    rules = CheckpointStrategy(save_total_limit=2)
    assert due(found(*infos), rules) == ["attempt-001/step-000020", "attempt-002/step-000020"]
    third = info(20, 0.6, attempt=2, folder="attempt-002/step-000020-try2")
    assert due(found(*infos, third), rules)[-1] == third.folder


def test_a_pinned_double_keeps_the_newer_save_of_its_step() -> None:
    """Were only the newer one deleted, the older would be listed again, perhaps as another best."""
    infos = [info(20, 0.0, pinned=True), info(20, 0.5, attempt=2), info(30, 0.2, attempt=2), info(40, 0.4, attempt=2)]
    rules = CheckpointStrategy(save_total_limit=1)
    assert due(found(*infos), rules) == []
    assert [(each.folder, keeps) for each, keeps in explain(infos, rules)][:2] == [
        ("attempt-001/step-000020", ("pinned",)),
        ("attempt-002/step-000020", ("pinned",)),
    ]
    assert infos[1].pinned is False


def test_leftovers_are_older_than_the_newest_complete_one_and_not_being_written() -> None:
    there = found("1/30", info(20, attempt=2), "2/10", "2/20", "2/30")
    assert leftovers(there) == ["1/30", "2/10"]
    assert leftovers(there, under_way={"2/10"}) == ["1/30"]
    assert leftovers(found("1/30")) == []


@given(
    st.lists(
        st.tuples(values, st.booleans(), st.booleans(), st.sampled_from([-4, -1, 1, 1, 2])), min_size=1, max_size=25
    ),
    strategies(),
    st.randoms(use_true_random=False),
)
def test_a_pass_cut_short_loses_nothing_and_the_next_one_finishes_it(
    series: list[tuple[float | None, bool, bool, int]], rules: CheckpointStrategy, random: Any
) -> None:
    there = list(saved(series))
    before = newest_per_step(there)
    plan = due(found(*there), rules)
    shuffled = random.sample(there, len(there))
    assert due(found(*shuffled), rules) == plan
    assert {each.folder for each, keeps in explain(shuffled, rules) if not keeps} == set(plan)
    for count in range(len(plan) + 1):
        left = [each for each in there if each.folder not in plan[:count]]
        listed = newest_per_step(left)
        assert {each.folder for each in listed} <= {each.folder for each in before}, (
            "what was superseded does not come back"
        )
        assert listed[-1] == before[-1]
        assert rules.best(listed) == rules.best(before)
        assert due(found(*left), rules) == plan[count:]


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        (CheckpointStrategy(save_total_limit=1), [1, 4]),
        (CheckpointStrategy(keep_last=2), [1, 3, 4]),
        (CheckpointStrategy(save_best_only=True), [1, 4]),
    ],
)
def test_killed_at_any_operation(tmp_path: Path, rules: CheckpointStrategy, kept: list[int]) -> None:
    full = Storage.open(tmp_path / "full")
    for step, loss in ((1, 0.1), (2, 0.0), (3, 0.4), (4, 0.3)):
        put(full, f"step-{step:06d}", step, {"val_loss": loss})
    put(full, "step-000002-try2", 3, {"val_loss": 0.5})  # supersedes the best there ever was
    put(full, "step-000003-try2", 5, {}, ranks=1)
    operations = 0
    for number, when in kill_points():
        base = tmp_path / f"{number}-{when}"
        shutil.copytree(full.root, base)
        storage = KillingStorage(base, number, when)
        try:
            apply_retention(CheckpointStore(storage), rules)
        except Killed:
            pass
        else:
            if when == "before":
                operations = number - 1
                break
        after = CheckpointStore(Storage.open(base))
        listed = after.checkpoints()
        assert [each.step for each in listed][-1] == 4
        assert rules.best(listed) == listed[0]
        assert {each.step for each in listed} >= set(kept)
        assert not [each for each in listed if after.verify(each)]
        apply_retention(after, rules)
        assert [each.step for each in after.checkpoints()] == kept
        assert sorted(os.listdir(base)) == [f"step-{step:06d}" for step in kept], "running it again finishes it"
        assert apply_retention(after, rules) == []
    assert operations >= 3 * (6 - len(kept)) - 1  # two manifests and the folder of each; the leftover has one manifest


def test_what_is_being_written_is_left_alone(tmp_path: Path) -> None:
    """A script started over in an old directory: its first steps are lower than what is there."""
    storage = Storage.open(tmp_path)
    put(storage, "step-000900", 900, {})
    put(storage, "step-000001", 901, {})
    put(storage, "step-000002", 902, {}, ranks=1)
    store = CheckpointStore(storage)
    assert gc(store, dry_run=True) == ["step-000002"]
    assert apply_retention(store, CheckpointStrategy(), under_way=["step-000002"]) == []
    assert gc(store) == ["step-000002"]
