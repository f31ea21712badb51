from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ray_tracking.checkpoint import manifest as names
from ray_tracking.checkpoint.retention import apply_retention, gc
from ray_tracking.checkpoint.state import capture
from ray_tracking.checkpoint.store import CheckpointStore
from ray_tracking.checkpoint.strategy import CheckpointStrategy
from ray_tracking.errors import CheckpointCorruptError, CheckpointError
from ray_tracking.storage import Storage

from .conftest import snapshot
from .faults import Killed, KillingStorage, kill_points

Save = Callable[..., str]


def root(store: CheckpointStore) -> Path:
    return Path(store.storage.root)


def steps(store: CheckpointStore) -> list[int]:
    return [info.step for info in store.checkpoints()]


def is_of_step(checkpoint: Any, step: int) -> bool:
    return bool(
        checkpoint.step == step
        and torch.equal(checkpoint.model_state["weight"], torch.full((4, 3), float(step)))
        and torch.equal(checkpoint.optimizer_state["state"][0]["exp_avg"], torch.full((4, 3), step / 7))
    )


def test_layout_and_plain_weights(store: CheckpointStore, save: Save) -> None:
    folder = save(store, 120, world_size=2)
    assert folder == "step-000120"
    assert sorted(os.listdir(root(store) / folder)) == sorted(FILES)
    weights = safetensors.torch.load_file(root(store) / folder / "model-00000-of-00002.safetensors")
    assert sorted(weights) == ["bias", "weight"]
    assert torch.equal(weights["weight"], torch.full((4, 3), 120.0))
    alone = save(store, 121)
    weights = safetensors.torch.load_file(root(store) / alone / "model.safetensors")
    assert sorted(weights) == ["bias", "weight"]


def test_what_is_replicated_is_written_once_and_spread(store: CheckpointStore) -> None:
    objects = {"model": {f"w{i}": torch.full((1000,), float(i)) for i in range(8)}, "loader": {"p": torch.arange(3.0)}}
    for rank in range(4):
        store.write_snapshot("step-000001", capture(objects, step=1, rank=rank, world_size=4))
    (info,) = store.checkpoints()
    shares = [
        safetensors.torch.load_file(root(store) / info.folder / f"model-{rank:05d}-of-00004.safetensors")
        for rank in range(4)
    ]
    assert [len(share) for share in shares] == [2, 2, 2, 2]
    assert sorted(name for share in shares for name in share) == sorted(objects["model"])
    loaded = store.load(info, rank=3, world_size=4)
    assert all(torch.equal(loaded.model_state[name], value) for name, value in objects["model"].items())
    assert torch.equal(loaded.objects["loader"]["p"], torch.arange(3.0))


def test_ranks_of_different_structure_are_no_checkpoint(store: CheckpointStore) -> None:
    for rank, size in ((0, 3), (1, 4)):
        part = capture({"model": {"w": torch.zeros(size)}}, step=1, rank=rank, world_size=2)
        store.write_snapshot("step-000001", part)
    assert store.scan()[0].reason == "the ranks saved states of different structure"


def test_tied_weights_open_with_safetensors_alone(store: CheckpointStore, tmp_path: Path) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(5, 3)
            self.head = torch.nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    store.write_snapshot("step-000001", capture({"model": model}, step=1))
    other = Tied()
    safetensors.torch.load_model(other, root(store) / "step-000001" / "model.safetensors")
    assert torch.equal(other.head.weight, model.head.weight)
    loaded = store.load_latest()
    assert loaded is not None
    assert list(loaded.model_state) == ["embed.weight", "head.weight"]


def test_list_and_load(store: CheckpointStore, save: Save) -> None:
    save(store, 2, epoch=1, metrics={"val_loss": 0.5, "nan": float("nan"), "inf": float("inf")})
    save(store, 10)
    assert steps(store) == [2, 10]
    info = store.find(2)
    assert info is not None
    assert (info.epoch, info.world_size, info.pinned) == (1, 1, False)
    assert info.metrics["val_loss"] == 0.5
    assert info.metrics["nan"] != info.metrics["nan"]
    assert info.metrics["inf"] == float("inf")
    assert info.size == sum(f.stat().st_size for f in (root(store) / info.folder).iterdir() if f.name[:4] != "rank")
    assert is_of_step(store.load(info), 2)
    assert store.find(3) is None
    assert store.verify(info) == []


def test_empty_store(store: CheckpointStore) -> None:
    assert store.checkpoints() == []
    assert store.load_latest() is None
    assert store.latest_valid() is None
    assert apply_retention(store, CheckpointStrategy()) == []


def test_ranks(store: CheckpointStore, save: Save) -> None:
    save(store, 5, world_size=2)
    info = store.checkpoints()[0]
    assert store.load(info, rank=1, world_size=2).objects["loader"] == {"position": 51}
    assert store.load(info, rank=0, world_size=2).objects["loader"] == {"position": 50}
    smaller = store.load(info, rank=0, world_size=1)
    assert smaller.objects["loader"] == {"position": 50}
    larger = [store.load(info, rank=rank, world_size=4) for rank in range(4)]
    assert [each.objects["loader"]["position"] for each in larger] == [50, 50, 50, 50]
    assert [each.rng is None for each in larger] == [False, False, True, True]
    assert all(is_of_step(each, 5) for each in larger)


def test_one_rank_missing_is_incomplete(store: CheckpointStore, save: Save) -> None:
    save(store, 5, world_size=2)
    save(store, 6, world_size=2)
    os.unlink(root(store) / "step-000006" / "rank-00001-of-00002.json")
    assert steps(store) == [5]
    reasons = [item.reason for item in store.scan() if item.info is None]
    assert reasons == ["the manifest of rank 1 is not there: rank-00001-of-00002.json"]


def test_attempts(tmp_path: Path, save: Save) -> None:
    storage = Storage.open(tmp_path)
    first, second = CheckpointStore(storage, "attempt-001"), CheckpointStore(storage, "attempt-002")
    save(first, 100)
    save(first, 120)
    assert second.folder_of(120) == "attempt-002/step-000120"
    save(second, 110)
    save(second, 120)
    assert [info.folder for info in first.checkpoints()] == [
        "attempt-001/step-000100",
        "attempt-002/step-000110",
        "attempt-002/step-000120",
    ]
    (tmp_path / "attempt-002/step-000120/rank-00000-of-00001.json").unlink()
    assert second.find(120).attempt == 1  # type: ignore[union-attr]
    latest = second.load_latest()
    assert latest is not None
    assert latest.step == 110, "what the newest attempt saved comes before what an earlier one did"
    with pytest.raises(CheckpointError, match="attempt-001"):
        CheckpointStore(storage, "../x")


def test_saving_a_step_again_never_mixes(store: CheckpointStore, save: Save) -> None:
    save(store, 5)
    assert save(store, 5, sequence=6) == "step-000005-try2"
    assert [info.folder for info in store.checkpoints()] == ["step-000005-try2"]
    with pytest.raises(CheckpointError, match="already holds a complete checkpoint"):
        save(store, 5, folder="step-000005")
    assert apply_retention(store, CheckpointStrategy()) == ["step-000005"]


def test_ranks_of_two_saves_in_one_folder_are_no_checkpoint(store: CheckpointStore) -> None:
    store.write_snapshot("step-000005", snapshot(5, rank=0, world_size=2, save_id="attempt 1"))
    store.write_snapshot("step-000005", snapshot(5, rank=1, world_size=2, save_id="attempt 2"))
    assert store.scan()[0].reason == "manifests of several saves are mixed"
    store.write_snapshot("step-000005", snapshot(5, rank=0, world_size=2, save_id="attempt 2"))
    assert steps(store) == [5]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "gone": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "foreign": lambda path: path.write_bytes(b'{"a": 1}'),
    "text": lambda path: path.write_bytes(b"hello"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "first bit": lambda path: flip(path, 0),
    "middle bit": lambda path: flip(path, path.stat().st_size // 2),
    "last bit": lambda path: flip(path, path.stat().st_size - 1),
}
FILES = [
    "model-00000-of-00002.safetensors",
    "rank-00000-of-00002.json",
    "rank-00001-of-00002.json",
    "state-00000.json",
    "state-00000.safetensors",
    "state-00001.json",
    "state-00001.safetensors",
]


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_any_damage_is_found_named_and_passed_over(
    store: CheckpointStore, save: Save, capsys: pytest.CaptureFixture[str], file: str, damage: str
) -> None:
    save(store, 5, world_size=2)
    save(store, 6, world_size=2)
    before = store.find(6)
    assert before is not None
    DAMAGES[damage](root(store) / "step-000006" / file)
    problems = store.verify(before)
    assert len(problems) == 1
    assert f"step-000006/{file}" in problems[0]
    info = CheckpointStore(store.storage).latest_valid()
    assert info is not None
    assert info.step == 5
    told = capsys.readouterr().err
    assert told.count("[warning") == 1
    assert "step-000006" in told
    assert file in told
    loads = [CheckpointStore(store.storage).load_latest(rank=rank) for rank in (0, 1)]
    mine = 1 if "00001" in file and not file.startswith("rank") else 0
    assert loads[mine] is not None
    assert is_of_step(loads[mine], 5)


def test_every_byte_of_a_manifest_counts(store: CheckpointStore, save: Save) -> None:
    save(store, 5, metrics={"val_loss": 0.25})
    data = (root(store) / "step-000005" / "rank-00000-of-00001.json").read_bytes()
    assert names.encode_manifest(names.decode_manifest(data)) == data
    for position in range(len(data)):
        for bit in (1, 32):
            bad = bytearray(data)
            bad[position] ^= bit
            with pytest.raises(names.ManifestError):
                names.decode_manifest(bytes(bad))


def test_a_newer_schema_is_skipped(
    store: CheckpointStore, save: Save, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(store, 5)
    monkeypatch.setattr(names, "SCHEMA", names.SCHEMA + 1)
    save(store, 6)
    monkeypatch.undo()
    latest = CheckpointStore(store.storage).load_latest()
    assert latest is not None
    assert latest.step == 5
    assert "newer version" in capsys.readouterr().err
    save(store, 7)
    assert gc(store) == [], "it is not rubbish"


def test_all_damaged_is_no_fresh_start(store: CheckpointStore, save: Save) -> None:
    save(store, 5)
    flip(root(store) / "step-000005" / "model.safetensors", 200)
    with pytest.raises(CheckpointCorruptError, match=r"step-000005/model\.safetensors"):
        store.load_latest()


class _Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("resealed", [False, True])
def test_a_pickle_is_refused_and_not_run(
    store: CheckpointStore, save: Save, tmp_path: Path, file: str, resealed: bool
) -> None:
    """Also when whoever put it there could write a manifest that vouches for it."""
    save(store, 5, world_size=2)
    target = tmp_path / "ran"
    payload = pickle.dumps(_Payload(target))
    folder = root(store) / "step-000005"
    (folder / file).write_bytes(payload)
    if resealed and not file.startswith("rank"):
        rank = 1 if "00001" in file else 0
        path = folder / names.rank_file(rank, 2)
        body = json.loads(path.read_bytes())
        body["files"][file] = {"size": len(payload), "digest": names.digest(payload), "raw_size": len(payload)}
        del body["digest"]
        path.write_bytes(names._seal(body))
        assert store.checkpoints() != []
    needed_by = {0, 1} if "00001" not in file else {1}
    for rank in (0, 1):
        refused = False
        try:
            refused = store.load_latest(rank=rank) is None  # another size: the checkpoint is not even listed
        except CheckpointCorruptError as error:
            refused = file in str(error)
        assert refused or (resealed and rank not in needed_by)
    assert not target.exists()
    pickle.loads(payload)  # noqa: S301 - our own: shows that the payload would have run
    assert target.exists()


def test_a_manifest_cannot_name_files_outside(store: CheckpointStore, save: Save) -> None:
    save(store, 5)
    path = root(store) / "step-000005" / "rank-00000-of-00001.json"
    for evil in ("../secret", "/etc/passwd", "model.pt"):
        body = json.loads(path.read_bytes())
        body["files"] = {evil: {"size": 1, "digest": "00", "raw_size": 1}}
        del body["digest"]
        with pytest.raises(names.ManifestError, match="names a file"):
            names.decode_manifest(names._seal(body))


def test_a_directory_full_of_rubbish(store: CheckpointStore, save: Save) -> None:
    for step in (1, 2, 3, 4, 5, 9):
        save(store, step)
    base = root(store)
    shutil.rmtree(base / "step-000001")
    (base / "step-000001").mkdir()
    (base / "step-000002" / "state-00000.json").unlink()
    shutil.copytree(base / "step-000004", base / "step-000007")  # renamed: written for another step
    (base / "step-000003" / "rank-00000-of-00001.json").write_bytes(b"")
    (base / "step-000006").write_bytes(b"a file where a folder should be")
    (base / "step-12").mkdir()
    (base / "step-000008-copy").mkdir()
    (base / "notes.txt").write_text("mine")
    assert steps(store) == [4, 5, 9]
    doomed = ["step-000001", "step-000002", "step-000003", "step-000007"]
    assert gc(store, dry_run=True) == doomed
    assert (base / "step-000001").exists()
    assert gc(store) == doomed
    left = ["notes.txt", "step-000004", "step-000005", "step-000006", "step-000008-copy", "step-000009"]
    assert sorted(os.listdir(base)) == [*left, "step-12"]


def test_a_save_under_way_is_not_collected(store: CheckpointStore, save: Save) -> None:
    save(store, 5)
    store.write_snapshot("step-000006", snapshot(6, rank=0, world_size=2))
    assert gc(store) == []
    store.write_snapshot("step-000006", snapshot(6, rank=1, world_size=2))
    assert steps(store) == [5, 6]


def test_pin(store: CheckpointStore, save: Save) -> None:
    for step in range(1, 4):
        save(store, step)
    store.pin(store.checkpoints()[0])
    assert [info.pinned for info in store.checkpoints()] == [True, False, False]
    assert apply_retention(store, CheckpointStrategy(save_total_limit=1)) == ["step-000002"]
    store.unpin(store.checkpoints()[0])
    assert apply_retention(store, CheckpointStrategy(save_total_limit=1)) == ["step-000001"]


def _whole(store: CheckpointStore) -> set[int]:
    """The steps that are complete by a check of the bytes that shares no code with the store."""
    found = set()
    for folder in root(store).glob("step-*"):
        manifests = sorted(folder.glob("rank-*.json"))
        try:
            bodies = [json.loads(path.read_bytes()) for path in manifests]
        except ValueError:
            continue
        files = {name: entry for body in bodies for name, entry in body["files"].items()}
        if (
            bodies
            and len(bodies) == bodies[0]["world_size"]
            and all(
                (folder / name).exists() and names.digest((folder / name).read_bytes()) == entry["digest"]
                for name, entry in files.items()
            )
        ):
            found.add(int(folder.name[5:11]))
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_killed_at_any_operation_of_a_save(tmp_path: Path, save: Save, world_size: int) -> None:
    committed_at = set()
    for number, when in kill_points():
        base = tmp_path / f"{number}-{when}"
        save(CheckpointStore(Storage.open(base)), 5, world_size=world_size)
        storage = KillingStorage(base, number, when)
        try:
            save(CheckpointStore(storage), 6, world_size=world_size)
        except Killed:
            pass
        else:
            assert storage.count == number - 1 or when == "during"
            if when == "before":
                break
        after = CheckpointStore(Storage.open(base))
        assert set(steps(after)) == _whole(after) >= {5}
        if 6 in steps(after):
            committed_at.add((number, when))
        latest = after.load_latest()
        assert latest is not None
        assert is_of_step(latest, max(steps(after)))
        # the run goes on: the same step is saved again and the leftovers go
        save(after, 6, world_size=world_size, sequence=7)
        save(after, 7, world_size=world_size, sequence=8)
        apply_retention(after, CheckpointStrategy())
        assert steps(after) == [5, 6, 7]
        assert len(list(base.iterdir())) == 3
        assert all(is_of_step(after.load(info), info.step) for info in after.checkpoints())
    writes = number - 1
    assert writes == 4 if world_size == 1 else writes == 7
    assert committed_at == {(writes, "after")}, "only the last manifest makes it a checkpoint"


@pytest.mark.parametrize("limit", [1, 2])
def test_killed_at_any_operation_of_retention(tmp_path: Path, save: Save, limit: int) -> None:
    rules = CheckpointStrategy(save_total_limit=limit)

    def fill(base: Path) -> CheckpointStore:
        store = CheckpointStore(Storage.open(base))
        for step, loss in ((1, 0.1), (2, 0.5), (3, 0.4), (4, 0.3)):
            save(store, step, metrics={"val_loss": loss})
        store.write_snapshot("step-000002-try2", snapshot(2, rank=0, world_size=2))
        return store

    for number, when in kill_points():
        base = tmp_path / f"{number}-{when}"
        fill(base)
        storage = KillingStorage(base, number, when)
        try:
            apply_retention(CheckpointStore(storage), rules)
        except Killed:
            pass
        else:
            if when == "before":
                break
        after = CheckpointStore(Storage.open(base))
        assert set(steps(after)) == _whole(after) >= {1, 4}
        assert all(store_ok == [] for store_ok in map(after.verify, after.checkpoints()))
        best = rules.best(after.checkpoints())
        assert best is not None
        assert is_of_step(after.load(best), 1)
        assert is_of_step(after.load_latest(), 4)
        apply_retention(after, rules)
        assert steps(after) == [1, 4]
        assert len(list(base.iterdir())) == 2, "running it again finishes it"
    assert number - 1 == 6
