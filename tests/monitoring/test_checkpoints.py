from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ray_tracking.checkpoint.contents import TensorEntry
from ray_tracking.checkpoint.manifest import CheckpointInfo, FileEntry, Manifest, rank_file
from ray_tracking.checkpoint.store import Found
from ray_tracking.errors import CheckpointCorruptError, ConfigError, UsageError
from ray_tracking.monitoring import checkpoints, pruning
from ray_tracking.monitoring.inside import Group, groups
from ray_tracking.monitoring.places import Activity, Place, all_places, directory_place, run_place
from ray_tracking.monitoring.strays import UNDER_WAY_SECONDS, Kind, Newest, Stray, classify, strays, why_kept
from ray_tracking.runs.record import Status
from ray_tracking.runs.store import RunStore
from ray_tracking.storage import Storage
from tests.monitoring.builder import RunBuilder
from tests.monitoring.checkpoint_dirs import DELETABLE, GOOD, LEFT_ALONE, good_directory, spoil


def manifest(step: int, rank: int = 0, world_size: int = 1, **fields: Any) -> Manifest:
    files = fields.pop("files", {"model.safetensors": FileEntry(100, "", 120)})
    return Manifest(step, 0, rank, world_size, step, 0.0, fields.pop("metrics", {}), ("model",), files, **fields)


def info(step: int, *, folder: str | None = None, sequence: int | None = None, **fields: Any) -> CheckpointInfo:
    made = CheckpointInfo(
        step, folder or f"step-{step:06d}", sequence=sequence or step, size=100, manifests=(manifest(step),)
    )
    return replace(made, **fields)


def found(*items: CheckpointInfo | tuple[int, str]) -> list[Found]:
    return [
        Found(item.folder, item.attempt, item.step, item)
        if isinstance(item, CheckpointInfo)
        else Found(f"step-{item[0]:06d}", 0, item[0], None, item[1])
        for item in items
    ]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(Storage.open(tmp_path))


# -- which one ----------------------------------------------------------------------------------------


def test_choose(place: Place) -> None:
    here = found(info(10, metrics={"loss": 0.1}), info(20, metrics={"loss": 0.3}), (30, "cut off"))
    watched = replace(place, monitor="loss")
    assert [checkpoints.choose(watched, here, which).step for which in ("latest", "best", "10")] == [20, 10, 10]
    with pytest.raises(CheckpointCorruptError, match="step-000030 is no complete checkpoint: cut off"):
        checkpoints.choose(watched, here, "30")
    with pytest.raises(UsageError, match=r"no checkpoint 40 .*there: 10, 20"):
        checkpoints.choose(watched, here, "40")
    with pytest.raises(UsageError, match=r"no checkpoint latest .*there: none"):
        checkpoints.choose(watched, [], "latest")
    with pytest.raises(UsageError, match="'worst' is no checkpoint"):
        checkpoints.choose(watched, here, "worst")


def test_the_best_where_nobody_named_the_monitor(place: Place) -> None:
    """Each save knew whether it was better than all before it: the newest such is the best."""
    here = found(
        info(10, metrics={"a": 1.0}, improved=True),
        info(20, metrics={"a": 0.5}, improved=True),
        info(30, metrics={"a": 2}),
    )
    assert checkpoints.choose(place, here, "best").step == 20
    assert checkpoints.choose(replace(place, monitor="a", mode="max"), here, "best").step == 30
    with pytest.raises(UsageError, match=r"none has a finite 'b'.*saved with them: a"):
        checkpoints.choose(replace(place, monitor="b"), found(info(10, metrics={"a": 1.0})), "best")


@pytest.mark.parametrize(
    ("word", "is_one"),
    [("10", True), ("latest", True), ("best", True), ("all", False), ("digits-10", False), ("-1", False)],
)
def test_words_that_say_which(word: str, is_one: bool) -> None:
    assert checkpoints.is_choice(word) is is_one
    assert checkpoints.is_choice("all", every=True)


def test_lines(place: Place) -> None:
    sealed = manifest(20, compression="zstd", encryption={"cipher": "C", "keys": [{"id": "aabbccddeeff0011"}]})
    infos = [
        info(10, metrics={"loss": 1.0, "acc": 0.5}),
        info(20, metrics={"loss": 2.0}, pinned=True, manifests=(sealed,)),
    ]
    first, second = checkpoints.lines(replace(place, monitor="loss"), infos)
    assert (first.metric, first.value, first.marks, first.raw_bytes, first.sealed) == ("loss", 1.0, ("best",), 120, "")
    assert (second.marks, second.sealed) == (("latest", "pinned"), "zstd, encrypted for aabbccdd")
    assert [line.metric for line in checkpoints.lines(place, infos)] == [None, None]  # which of two is not known
    assert checkpoints.lines(place, []) == []


def test_an_older_try_of_a_step_is_apart() -> None:
    here = found(info(10, sequence=1), info(10, folder="step-000010-try2", sequence=5))
    assert [each.folder for each in checkpoints.complete(here)] == ["step-000010-try2"]
    assert [line.folder for line in checkpoints.superseded(here)] == ["step-000010"]


def test_like_tensors_are_one_line() -> None:
    names = ("layers.0.weight", "layers.11.weight", "conv2d.weight", "layers.3.bias")
    tensors = [TensorEntry("model", name, "F32", (2, 2), 16, 0, "model.safetensors") for name in names]
    assert groups(tensors) == [
        Group("model", "layers.*.weight", 2, "F32", (2, 2), 32),
        Group("model", "conv2d.weight", 1, "F32", (2, 2), 16),
        Group("model", "layers.*.bias", 1, "F32", (2, 2), 16),
    ]


# -- places -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "silent", "activity"),
    [
        (Status.RUNNING, 1.0, Activity.RUNNING),
        (Status.RUNNING, 3600.0, Activity.UNKNOWN),
        (Status.COMPLETED, 3600.0, Activity.ENDED),
        (Status.FAILED, 1.0, Activity.ENDED),
    ],
)
def test_whether_a_save_may_be_under_way(store: RunStore, status: Status, silent: float, activity: Activity) -> None:
    run = RunBuilder(store, "r", created=1000.0).alive(5000.0)
    if status.is_final:
        run.finish(status, at=4000.0)
    assert run_place(store, "r", 5000.0 + silent).activity is activity


def test_a_place_knows_its_rules(store: RunStore) -> None:
    RunBuilder(store, "r").config({"training": {"default": {"save_total_limit": 7}}}).resume(5)
    place = run_place(store, "r", 0.0)
    assert (place.monitor, place.mode, place.newest_attempt, place.section) == (
        "val/loss",
        "min",
        2,
        {"save_total_limit": 7},
    )
    assert directory_place(store.directory("r").uri, {}, 0.0).run_id == "r"
    plain = directory_place(store.storage.uri, {"keep_last": 2}, 0.0, monitor="m")
    assert (plain.run_id, plain.activity, plain.monitor, plain.section) == (
        None,
        Activity.UNKNOWN,
        "m",
        {"keep_last": 2},
    )


def test_a_place_is_named_without_credentials(place: Place) -> None:
    storage = Storage(place.storage.filesystem, "bucket/c", "s3://key:secret@bucket/c")
    assert Place(storage).title == "s3://bucket/c"


def test_all_places(store: RunStore) -> None:
    RunBuilder(store, "a")
    store.storage.write_bytes("b/run.json", b"{")
    store.storage.write_bytes("checkpoints/step-000001/x", b"")
    places, problems = all_places(store, 0.0)
    assert [place.run_id for place in places] == ["a", None]
    assert len(problems) == 1
    assert "b/run.json is damaged" in problems[0]


# -- pruning ------------------------------------------------------------------------------------------


def planned(place: Place, here: list[Found], **options: int) -> dict[int, str | None]:
    """step -> why it goes, None if it stays."""
    plan = pruning.prune_plan(place, here, pruning.rules(place, **options))
    return {line.info.step: line.why if line.delete else None for line in plan}


def test_rules_given_by_hand(place: Place) -> None:
    watched = replace(place, monitor="loss")
    here = found(*(info(step, metrics={"loss": abs(step - 20)}, pinned=step == 10) for step in range(10, 70, 10)))
    assert [step for step, gone in planned(watched, here, keep_last=2).items() if gone] == [30, 40]
    assert [step for step, gone in planned(watched, here, keep_best=2).items() if gone] == [40, 50]
    assert [step for step, gone in planned(watched, here, keep_every=30).items() if gone] == [40, 50]
    assert [step for step, gone in planned(watched, here, keep_last=1, keep_every=50).items() if gone] == [30, 40]


def test_rules_of_the_config_and_none(place: Place) -> None:
    here = found(*(info(step, metrics={"loss": float(step)}) for step in (1, 2, 3, 4)))
    configured = replace(place, monitor="loss", section={"save_total_limit": 2, "monitor": "something else"})
    assert planned(configured, here) == {1: None, 2: "beyond the limit of 2", 3: "beyond the limit of 2", 4: None}
    with pytest.raises(UsageError, match="not known"):
        pruning.rules(place)
    with pytest.raises(ConfigError):
        pruning.rules(replace(place, section={"keep_lst": 2}))


def test_the_best_is_never_pruned_though_its_metric_has_no_name(place: Place) -> None:
    here = found(info(1, metrics={"m": 9.0}, improved=True), info(2, metrics={"m": 1.0}), info(3, metrics={"m": 2.0}))
    assert [step for step, gone in planned(place, here, keep_last=1).items() if gone] == [2]
    nameless = found(*(info(step, metrics={"m": float(step)}) for step in (1, 2, 3)))
    with pytest.raises(UsageError, match="--monitor"):
        planned(place, nameless, keep_last=1)
    assert [step for step, gone in planned(place, found(info(1), info(2)), keep_last=1).items() if gone] == [1]


def test_an_older_try_goes_unless_pinned(place: Place) -> None:
    older, newer = info(5, sequence=1), info(5, folder="step-000005-try2", sequence=2)
    plan = pruning.prune_plan(place, found(older, newer), pruning.rules(place, keep_last=9))
    assert [(line.delete, line.why) for line in plan] == [(True, "saved again later"), (False, "latest, last 9")]
    plan = pruning.prune_plan(place, found(replace(older, pinned=True), newer), pruning.rules(place, keep_last=9))
    assert not any(line.delete for line in plan)


def test_what_was_pinned_meanwhile_stays(tmp_path: Path) -> None:
    import shutil

    shutil.copytree(good_directory(), tmp_path / "c")
    place = replace(directory_place(str(tmp_path / "c"), {}, 0.0), monitor="loss")
    plan = pruning.prune_plan(place, place.store.scan(), pruning.rules(place, keep_last=1))
    (tmp_path / "c" / "step-000010" / "pinned").touch()
    failed = pruning.prune(place, plan)
    assert [(line.info.step, why) for line, why in failed] == [(10, "it has been pinned meanwhile")]
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["step-000010", "step-000030"]


# -- what does not count ------------------------------------------------------------------------------


def test_every_kind_of_stray_is_told_apart(tmp_path: Path) -> None:
    spoil(tmp_path / "spoilt", good_directory())
    place = directory_place(str(tmp_path / "spoilt"), {}, 0.0)
    here = place.store.scan()
    assert [each.step for each in checkpoints.complete(here)] == list(GOOD)
    assert {stray.path: stray.kind for stray in strays(place, here, 0.0)} == {**DELETABLE, **LEFT_ALONE}


def two_ranks(**second: Any) -> dict[str, Manifest]:
    files = {"state-00001.json": FileEntry(10, "", 10)}
    return {rank_file(0, 2): manifest(7, 0, 2), rank_file(1, 2): manifest(7, 1, 2, files=files, **second)}


def cases() -> Iterator[tuple[dict[str, int], dict[str, Manifest | Kind], list[str], Kind]]:
    sizes = {"model.safetensors": 100, "state-00001.json": 10, rank_file(0, 2): 500, rank_file(1, 2): 500}
    yield {}, {}, [], Kind.EMPTIED
    yield {"pinned": 7}, {}, [], Kind.EMPTIED
    yield {"model.safetensors": 0}, {}, [], Kind.EMPTIED
    yield {"model.safetensors": 5}, {}, [], Kind.HALF_WRITTEN
    yield {"model.safetensors": 5, "x.pkl": 5}, {}, ["x.pkl"], Kind.FOREIGN
    yield sizes, {**two_ranks(), rank_file(1, 2): Kind.DAMAGED}, [], Kind.DAMAGED
    yield sizes, {**two_ranks(), rank_file(1, 2): Kind.OTHER_VERSION}, [], Kind.OTHER_VERSION
    yield sizes, {rank_file(0, 2): manifest(7, 0, 2)}, [], Kind.HALF_WRITTEN
    yield {**sizes, "model.safetensors": 99}, two_ranks(), [], Kind.TRUNCATED
    yield {name: size for name, size in sizes.items() if "state" not in name}, two_ranks(), [], Kind.TRUNCATED
    # the second rank has yet to write over what a save before this one left
    yield sizes, two_ranks(save_id="earlier"), [], Kind.HALF_WRITTEN
    # all of another step, and only a part of it
    other = {name: replace(each, step=9) for name, each in two_ranks().items()}
    yield sizes, other, [], Kind.RENAMED
    yield {**sizes, "model.safetensors": 1}, other, [], Kind.TRUNCATED


@pytest.mark.parametrize(("sizes", "read", "odd", "kind"), list(cases()))
def test_classify(sizes: dict[str, int], read: dict[str, Manifest | Kind], odd: list[str], kind: Kind) -> None:
    assert classify(7, sizes, read, odd, "the store's reason")[0] is kind


def stray(kind: Kind = Kind.HALF_WRITTEN, step: int | None = 50, *, age: float = 0.0, **fields: Any) -> Stray:
    return Stray("x", kind, "", 0, fields.pop("attempt", 2), step, NOW - age, **fields)


NOW = 1_000_000.0
DAY = UNDER_WAY_SECONDS + 1


@pytest.mark.parametrize(
    ("activity", "item", "goes"),
    [
        (Activity.ENDED, stray(), True),
        (Activity.ENDED, stray(pinned=True), False),
        (Activity.ENDED, stray(Kind.FOREIGN), False),
        (Activity.ENDED, stray(Kind.RENAMED), False),
        (Activity.ENDED, stray(Kind.OTHER_VERSION, age=DAY), False),
        (Activity.ENDED, stray(Kind.UNFINISHED_FILE, None), True),
        (Activity.RUNNING, stray(age=DAY), False),
        (Activity.RUNNING, stray(attempt=1), True),
        (Activity.RUNNING, stray(Kind.UNFINISHED_FILE, None, attempt=0, age=DAY), False),
        (Activity.RUNNING, stray(Kind.TRUNCATED), False),
        (Activity.UNKNOWN, stray(), False),
        (Activity.UNKNOWN, stray(age=DAY), True),
        (Activity.UNKNOWN, stray(Kind.TRUNCATED), True),
        # older than the newest complete one by its step and by its time
        (Activity.UNKNOWN, stray(step=30, age=200.0), True),
        # a script that was started over saves step 30 again
        (Activity.UNKNOWN, stray(step=30, age=50.0), False),
        # another rank is still writing step 40
        (Activity.UNKNOWN, stray(step=41, age=200.0), False),
        (Activity.UNKNOWN, stray(Kind.UNFINISHED_FILE, None, age=50.0), False),
    ],
)
def test_why_kept(place: Place, activity: Activity, item: Stray, goes: bool) -> None:
    judged = replace(place, activity=activity, newest_attempt=2)
    assert (why_kept(item, judged, Newest(2, 40, NOW - 100.0), NOW) is None) is goes
