from __future__ import annotations

import itertools
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_tracking.checkpoint import manifest as names
from ray_tracking.checkpoint import mapping, verified
from ray_tracking.checkpoint.codec import encode_state
from ray_tracking.checkpoint.keys import Key, Keyring, WrongKeyError, generate_key
from ray_tracking.checkpoint.manifest import CheckpointInfo
from ray_tracking.checkpoint.reader import OpenCheckpoint, problems, read_objects
from ray_tracking.checkpoint.store import CheckpointStore
from ray_tracking.checkpoint.writer import WriterOptions
from ray_tracking.config.models import EncryptionConfig
from ray_tracking.errors import CheckpointCorruptError
from ray_tracking.storage import Storage

from . import by_hand

KEYS = Keyring(Key(bytes(range(32))))
SEALED: dict[str, dict[str, Any]] = {
    "plain": {},
    "compressed": {"compression": "zstd"},
    "encrypted": {"keyring": KEYS},
    "both": {"compression": "zstd", "keyring": KEYS},
}
sealed = pytest.mark.parametrize("how", SEALED)


def objects(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(40, 30, generator=generator)
    model: OrderedDict[str, Any] = OrderedDict(
        {"a.weight": weight, "b.weight": weight, "a.bias": torch.randn(40, generator=generator).bfloat16()}
    )
    model._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    moments = {index: {"step": torch.tensor(3.0), "exp_avg": torch.randn(70, index + 1)} for index in range(4)}
    return {
        "model": model,
        "optimizer": {"state": moments, "param_groups": [{"lr": 0.1, "params": [0, 1, 2, 3]}]},
        "ema": {"shadow": torch.arange(5), "fp8": torch.ones(3).to(torch.float8_e5m2), "none": torch.empty(0, 2)},
        "scheduler": {"last": 3, "betas": (0.9, float("nan")), "seen": Counter("aab"), "recent": deque([1], 3)},
        "text": {"bytes": bytes(range(256)) * 20, "array": np.arange(700, dtype=np.float64).reshape(7, 100)},
    }


def own(world_size: int) -> dict[str, list[Any]]:
    return {
        "loader": [{"position": 10 + rank, "order": torch.arange(20) * rank} for rank in range(world_size)],
        "rng": [{"torch": torch.full((500,), rank, dtype=torch.uint8)} for rank in range(world_size)],
    }


def save(root: Path, *, how: str = "plain", world_size: int = 1, seed: int = 0, step: int = 5) -> CheckpointInfo:
    return by_hand.write(root, objects(seed), own=own(world_size), world_size=world_size, step=step, **SEALED[how])


def same(one: Any, other: Any) -> bool:
    """Equal in every bit, type and name."""
    first, second = encode_state(one), encode_state(other)
    return (
        first.tree == second.tree
        and first.tensors.keys() == second.tensors.keys()
        and all(
            tensor.dtype == second.tensors[name].dtype
            and torch.equal(tensor.reshape(-1).view(torch.uint8), second.tensors[name].reshape(-1).view(torch.uint8))
            for name, tensor in first.tensors.items()
        )
    )


def files_of(info: CheckpointInfo) -> list[str]:
    return sorted(name for manifest in info.manifests for name in manifest.files)


def load_all(root: Path, info: CheckpointInfo) -> list[dict[str, Any]]:
    """What all ranks load together."""
    return [read_objects(Storage.open(root), info, rank, keyring=KEYS) for rank in range(info.world_size)]


def refused(root: Path, info: CheckpointInfo, file: str) -> bool:
    """Whether loading and verifying both refuse it and name the file by its full path."""
    path = str(root / info.folder / file)
    with pytest.raises(CheckpointCorruptError) as caught:
        load_all(root, info)
    found = problems(Storage.open(root), info, KEYS)
    return path in caught.value.message and len(found) == 1 and path in found[0]


# -- what was saved comes back -----------------------------------------------------------------------


@sealed
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_gets_what_was_saved(tmp_path: Path, how: str, world_size: int) -> None:
    torch.manual_seed(0)
    info = save(tmp_path, how=how, world_size=world_size)
    torch.manual_seed(0)
    expected = objects()
    with OpenCheckpoint(Storage.open(tmp_path), info, KEYS) as opened:
        for rank in range(world_size):
            assert opened.names(rank) == ("ema", "loader", "model", "optimizer", "rng", "scheduler", "text")
            states = opened.states(rank)
            for name, state in expected.items():
                assert same(states[name], state), name
                assert same(opened.state(name, rank, copy=False), state), name
            for name, each in own(world_size).items():
                assert same(states[name], each[rank]), name
        assert states["model"]["a.weight"] is states["model"]["b.weight"], "tied tensors are one again"
        assert states["model"]._metadata == {"": {"version": 1}}
        with pytest.raises(KeyError):
            opened.state("nothing")
    assert problems(Storage.open(tmp_path), info, KEYS) == []


@sealed
def test_loaded_states_have_memory_of_their_own(tmp_path: Path, how: str) -> None:
    torch.manual_seed(0)
    info = save(tmp_path, how=how, world_size=2)
    torch.manual_seed(0)
    expected = objects()
    loaded = load_all(tmp_path, info)
    for file in (tmp_path / info.folder).iterdir():
        with open(file, "r+b") as stream:
            stream.write(bytes(file.stat().st_size))
    shutil.rmtree(tmp_path / info.folder)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert all(same(loaded[0][name], state) for name, state in expected.items())
    loaded[0]["model"]["a.weight"].zero_()
    assert same(loaded[0]["optimizer"], expected["optimizer"])


def test_views_are_the_files_and_end_with_them(tmp_path: Path) -> None:
    info = save(tmp_path)
    with OpenCheckpoint(Storage.open(tmp_path), info) as opened:
        weight = opened.state("model", copy=False)["a.weight"]
        again = opened.state("model", copy=False)["a.weight"]
        assert weight.data_ptr() == again.data_ptr() == opened.tensor("model", "a.weight").data_ptr()
        assert str(tmp_path) in Path("/proc/self/maps").read_text()
        del weight, again
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_only_the_files_that_are_needed_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = save(tmp_path, world_size=2)
    seen: list[str] = []
    real = mapping.open_bytes
    monkeypatch.setattr(
        mapping, "open_bytes", lambda storage, name, size: seen.append(name.split("/")[1]) or real(storage, name, size)
    )
    storage = Storage.open(tmp_path)
    assert list(read_objects(storage, info, 0, only="model")) == ["model"]
    assert sorted(seen) == ["model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors", "state-00000.json"]
    seen.clear()
    assert list(read_objects(storage, info, 1, only="loader")) == ["loader"]
    assert sorted(seen) == ["state-00001.json", "state-00001.safetensors"]
    seen.clear()
    read_objects(storage, info, 0, only="scheduler")
    assert seen == ["state-00000.json"]
    assert read_objects(storage, info, 1, only="model") == {}


def test_verifying_needs_no_torch(tmp_path: Path) -> None:
    save(tmp_path, world_size=2)
    script = (
        "import sys\n"
        "from ray_tracking.checkpoint import CheckpointStore\n"
        "from ray_tracking.checkpoint.reader import OpenCheckpoint, problems\n"
        "from ray_tracking.storage import Storage\n"
        "storage = Storage.open(sys.argv[1])\n"
        "info = CheckpointStore(storage).find(5)\n"
        "assert problems(storage, info) == []\n"
        "assert 'model' in OpenCheckpoint(storage, info).names()\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    repository = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False, cwd=repository).returncode == 0


# -- what was not saved does not -----------------------------------------------------------------------


@sealed
def test_a_bit_flipped_anywhere_is_found(tmp_path: Path, how: str) -> None:
    info = save(tmp_path, how=how, world_size=2)
    chosen = random.Random(1)
    for file in files_of(info):
        path = tmp_path / info.folder / file
        data = path.read_bytes()
        for position in {0, 7, 8, len(data) - 1, *(chosen.randrange(len(data)) for _ in range(12))}:
            bad = bytearray(data)
            bad[position] ^= 1 << chosen.randrange(8)
            path.write_bytes(bad)
            assert refused(tmp_path, info, file), position
        path.write_bytes(data)
    load_all(tmp_path, info)


def _pickled(path: Path) -> bytes:
    return pickle.dumps(_Payload(path.parents[1] / "ran"))


def _zip(path: Path) -> bytes:
    torch.save({"payload": torch.ones(3)}, path)
    return path.read_bytes()


class _Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


CONTENTS: dict[str, Callable[[Path], bytes]] = {
    "empty": lambda path: b"",
    "cut": lambda path: path.read_bytes()[:-1],
    "half": lambda path: path.read_bytes()[: path.stat().st_size // 2],
    "longer": lambda path: path.read_bytes() + b"\0",
    "zeros": lambda path: bytes(path.stat().st_size),
    "text": lambda path: b"hello",
    "another JSON": lambda path: b'{"objects": {}, "pieces": {}}',
    "another safetensors": lambda path: safetensors.torch.save({"x": torch.ones(2)}),
    "a pickle": _pickled,
    "a pickle of the same size": lambda path: _pickled(path).ljust(path.stat().st_size, b"\0"),
    "a torch file": _zip,
}


@sealed
@pytest.mark.parametrize("content", CONTENTS)
def test_other_content_is_found(tmp_path: Path, how: str, content: str) -> None:
    info = save(tmp_path, how=how, world_size=2)
    for file in files_of(info):
        path = tmp_path / info.folder / file
        data = path.read_bytes()
        path.write_bytes(CONTENTS[content](path))
        assert refused(tmp_path, info, file)
        path.unlink()
        assert refused(tmp_path, info, file)
        path.write_bytes(data)
    assert not (tmp_path / "ran").exists()
    load_all(tmp_path, info)


def test_what_is_no_file_is_found(tmp_path: Path) -> None:
    info = save(tmp_path, world_size=2)
    for file in files_of(info):
        path = tmp_path / info.folder / file
        away = tmp_path / "away"
        path.rename(away)
        for put in (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(away)):  # noqa: B023
            put()
            assert refused(tmp_path, info, file)
            path.rmdir() if path.is_dir() else path.unlink()
        away.rename(path)
    load_all(tmp_path, info)


@sealed
def test_files_of_other_ranks_and_steps_are_found(tmp_path: Path, how: str) -> None:
    """All have the same size as what they stand for, and are whole and genuine."""
    first = by_hand.write(tmp_path, {"model": {"x": torch.zeros(9), "y": torch.zeros(9)}}, world_size=2, **SEALED[how])
    other = by_hand.write(
        tmp_path, {"model": {"x": torch.ones(9), "y": torch.ones(9)}}, world_size=2, step=6, **SEALED[how]
    )
    load_all(tmp_path, first)
    for file in files_of(first):
        path = tmp_path / first.folder / file
        data = path.read_bytes()
        twin = file.replace("00000", "0000X").replace("00001", "00000").replace("0000X", "00001")
        for source in (tmp_path / other.folder / file, tmp_path / first.folder / twin):
            if source.read_bytes() != data:
                path.write_bytes(source.read_bytes())
                assert refused(tmp_path, first, file), source
        path.write_bytes(data)


@pytest.mark.parametrize("content", CONTENTS)
def test_content_that_a_manifest_vouches_for_is_still_no_pickle(tmp_path: Path, content: str) -> None:
    """Whoever can write everything can make another checkpoint of a plain one, but nothing else."""
    info = save(tmp_path)
    for file in files_of(info):
        before = (tmp_path / info.folder / file).read_bytes()
        changed = by_hand.replace_file(tmp_path, info, file, CONTENTS[content](tmp_path / info.folder / file))
        if not (content == "another JSON" and file.endswith("json")):
            with pytest.raises(CheckpointCorruptError):
                load_all(tmp_path, changed)
        by_hand.replace_file(tmp_path, info, file, before)
    assert not (tmp_path / "ran").exists()


DOCUMENTS: dict[str, Any] = {
    "no objects": {"pieces": {}},
    "objects as a list": {"objects": [], "pieces": {}},
    "an object without a tree": {"objects": {"a": {"file": "model"}}, "pieces": {}},
    "files elsewhere": {"objects": {"a": {"file": "../../x", "tree": 1}}, "pieces": {}},
    "a tensor that is not there": {
        "objects": {"a": {"file": "state", "tree": {"$": "tensor", "name": "b"}}},
        "pieces": {},
    },
    "a tensor without a name": {"objects": {"a": {"file": "state", "tree": {"$": "tensor"}}}, "pieces": {}},
    "a kind that is not known": {"objects": {"a": {"file": "state", "tree": {"$": "pickle", "x": "y"}}}, "pieces": {}},
    "a kind that can't be": {"objects": {"a": {"file": "state", "tree": {"$": ["dict"]}}}, "pieces": {}},
    "a deep one": {"objects": {"a": {"file": "state", "tree": [[]]}}, "pieces": {}},
    "a number that is none": {"objects": {"a": {"file": "state", "tree": {"$": "float", "hex": "00"}}}, "pieces": {}},
    "a sharded one in no part": {
        "objects": {"a": {"file": "state", "tree": {"$": "sharded", "name": "w", "shape": [3], "dtype": "float32"}}},
        "pieces": {"w": [0]},
    },
    "a sharded one of an odd dtype": {
        "objects": {"a": {"file": "state", "tree": {"$": "sharded", "name": "w", "shape": [3], "dtype": "load"}}},
        "pieces": {},
    },
}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_crafted_document_is_refused(tmp_path: Path, document: str) -> None:
    info = save(tmp_path)
    text = json.dumps(DOCUMENTS[document])
    if document == "a deep one":
        text = text.replace("[[]]", "[" * 50_000 + "]" * 50_000)
    changed = by_hand.replace_file(tmp_path, info, "state-00000.json", text.encode())
    with pytest.raises(CheckpointCorruptError, match=f"{tmp_path}/{info.folder}/state-00000"):
        load_all(tmp_path, changed)


def test_a_crafted_header_is_refused_by_name(tmp_path: Path) -> None:
    info = save(tmp_path)
    header = b'{"a.weight":{"dtype":"F32","shape":[40,30],"data_offsets":[0,4800]}}'
    data = len(header).to_bytes(8, "little") + header + bytes(40)
    changed = by_hand.replace_file(tmp_path, info, "model.safetensors", data)
    with pytest.raises(
        CheckpointCorruptError, match=rf"{tmp_path}/step-000005/model\.safetensors is not a safetensors"
    ):
        load_all(tmp_path, changed)


def test_a_compressed_file_can_not_claim_another_size(tmp_path: Path) -> None:
    info = save(tmp_path, how="compressed")
    (manifest,) = info.manifests
    for size in (0, 1, manifest.files["model.safetensors.zst"].raw_size + 1, 1 << 60):
        entry = manifest.files["model.safetensors.zst"]._replace(raw_size=size)
        files = {**manifest.files, "model.safetensors.zst": entry}
        changed = replace(info, manifests=(replace(manifest, files=files),))
        with pytest.raises(CheckpointCorruptError, match=r"model\.safetensors\.zst is not what was saved"):
            load_all(tmp_path, changed)


def test_an_unknown_compression_or_cipher_is_said(tmp_path: Path) -> None:
    info = save(tmp_path)
    (manifest,) = info.manifests
    for change, said in (
        ({"compression": "lzma"}, "compression that is not known: 'lzma'"),
        ({"encryption": {"cipher": "ROT13"}}, "cipher that is not known: 'ROT13'"),
        ({"encryption": {"cipher": "AES-256-GCM-STREAM", "keys": 3}}, "encrypted for"),
    ):
        with pytest.raises((CheckpointCorruptError, WrongKeyError), match=said):
            load_all(tmp_path, replace(info, manifests=(replace(manifest, **change),)))


# -- keys -----------------------------------------------------------------------------------------------


def test_without_the_right_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = save(tmp_path, how="encrypted", world_size=2)
    storage = Storage.open(tmp_path)
    for keyring in (None, Keyring(Key(bytes(32)))):
        with pytest.raises(
            WrongKeyError, match=f"{tmp_path}/step-000005/rank-00000-of-00002.json: It is encrypted for"
        ):
            read_objects(storage, info, 0, keyring=keyring)
        assert problems(storage, info, keyring) == []
        assert capsys.readouterr().err.count("not opened: digests compared, nothing proven") == 1
    (tmp_path / info.folder / "state-00001.json.enc").write_bytes(b"x")
    assert len(problems(storage, info)) == 1
    assert len(problems(storage, info, KEYS)) == 1


def test_a_manifest_altered_without_the_key_is_found(tmp_path: Path) -> None:
    """Its own digest is right, and so are the digests in it: only the code with the key is not."""
    info = save(tmp_path, how="encrypted")
    (manifest,) = info.manifests
    encryption = dict(manifest.encryption or {})
    changes: dict[str, dict[str, Any]] = {
        "metrics": {"metrics": {"val_loss": 0.1}},
        "epoch": {"epoch": 3},
        "a file less": {"files": dict(list(manifest.files.items())[1:])},
        "no code": {"encryption": {key: value for key, value in encryption.items() if key != "mac"}},
        "an odd code": {"encryption": {**encryption, "mac": "\udc80"}},
        "another code": {"encryption": {**encryption, "mac": "0" * 64}},
        "keys of another save": {"encryption": {**encryption, "keys": KEYS.new_data_key().wrapped}},
    }
    for what, change in changes.items():
        changed = replace(manifest, **change)
        path = tmp_path / info.folder / "rank-00000-of-00001.json"
        path.write_bytes(names.encode_manifest(changed))
        now = replace(info, manifests=(names.decode_manifest(path.read_bytes()),))
        with pytest.raises(CheckpointCorruptError, match=f"{path}"):
            load_all(tmp_path, now)
        assert any(str(path) in problem for problem in problems(Storage.open(tmp_path), now, KEYS)), what


# -- sharded tensors ------------------------------------------------------------------------------------


def sharded(root: Path, tensor: torch.Tensor, boxes: list[by_hand.Box | None]) -> CheckpointInfo:
    objects = {"model": {"w": tensor, "small": torch.ones(3)}, "optimizer": {"exp_avg": tensor * 2}}
    return by_hand.write(root, objects, cuts={"w": boxes, "optimizer.exp_avg": boxes}, world_size=len(boxes))


def rows(count: int, columns: int, world_size: int) -> list[by_hand.Box | None]:
    """As FSDP2 does: ceil(count / world_size) rows each, the last ones fewer or none."""
    each = -(-count // world_size)
    boxes: list[by_hand.Box | None] = []
    for rank in range(world_size):
        begin, end = min(rank * each, count), min((rank + 1) * each, count)
        boxes.append(((begin, 0), (end - begin, columns)) if end > begin else None)
    return boxes


@pytest.mark.parametrize("rank_count", [1, 2, 3, 4, 7])
def test_two_shards_are_restored_on_any_number_of_ranks(tmp_path: Path, rank_count: int) -> None:
    whole = torch.randn(11, 3)
    info = sharded(tmp_path, whole, rows(11, 3, 2))
    with OpenCheckpoint(Storage.open(tmp_path), info) as opened:
        assert torch.equal(opened.state("model")["w"], whole)
        assert torch.equal(opened.state("optimizer", copy=False)["exp_avg"], whole * 2)
        for box in rows(11, 3, rank_count):
            if box is not None:
                assert torch.equal(opened.region("model", "w", *box), by_hand.part(whole, box))
                local = opened.state("model", local=lambda name, shape, dtype: opened.region("model", name, *box))  # noqa: B023
                assert torch.equal(local["w"], by_hand.part(whole, box))
                assert torch.equal(local["small"], torch.ones(3))


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_region_of_any_grid(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    edges = [sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=2))}) for size in shape]
    spans = [list(itertools.pairwise(cuts)) for cuts in edges]
    boxes = [
        (tuple(begin for begin, _ in box), tuple(end - begin for begin, end in box))
        for box in itertools.product(*spans)
    ]
    boxes = data.draw(st.permutations(boxes))
    whole = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    root = tmp_path_factory.mktemp("grid")
    info = sharded(root, whole, list(boxes))
    offset = tuple(data.draw(st.integers(0, size)) for size in shape)
    size = tuple(data.draw(st.integers(0, most - begin)) for most, begin in zip(shape, offset, strict=True))
    with OpenCheckpoint(Storage.open(root), info) as opened:
        region = opened.region("model", "w", offset, size, rank=data.draw(st.integers(0, len(boxes) - 1)))
        assert torch.equal(region, by_hand.part(whole, (offset, size)))
        del region


def test_a_rank_reads_its_own_part_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.randn(16, 2)
    info = sharded(tmp_path, whole, rows(16, 2, 4))
    seen: set[str] = set()
    real = mapping.open_bytes
    monkeypatch.setattr(
        mapping, "open_bytes", lambda storage, name, size: seen.add(name.split("/")[1]) or real(storage, name, size)
    )
    for rank, offset, size, needed in (
        (2, (8, 0), (4, 2), {2}),
        (0, (4, 0), (4, 2), {1}),
        (0, (0, 0), (8, 2), {0, 1}),
        (0, (5, 0), (6, 1), {1, 2}),
    ):
        seen.clear()
        with OpenCheckpoint(Storage.open(tmp_path), info) as opened:
            assert torch.equal(opened.region("model", "w", offset, size, rank), by_hand.part(whole, (offset, size)))
        assert seen - {names.state_file(each) for each in range(4)} == {names.model_file(each, 4) for each in needed}


def test_parts_that_do_not_make_the_whole_are_refused(tmp_path: Path) -> None:
    whole = torch.randn(4, 2)
    cases: dict[str, list[by_hand.Box | None]] = {
        "leave a hole": [((0, 0), (2, 2)), ((3, 0), (1, 2))],
        "overlap": [((0, 0), (3, 2)), ((2, 0), (2, 2))],
        "leave a hole in": [((0, 0), (2, 2)), None],
    }
    for number, (said, boxes) in enumerate(cases.items()):
        info = sharded(tmp_path / str(number), whole, boxes)
        with pytest.raises(CheckpointCorruptError, match=said):
            load_all(tmp_path / str(number), info)
    info = sharded(tmp_path / "good", whole, rows(4, 2, 2))
    with OpenCheckpoint(Storage.open(tmp_path / "good"), info) as opened:
        for offset, size in (((0, 0), (5, 2)), ((-1, 0), (2, 2)), ((0,), (2,)), ((0, 0), (2, 2, 1))):
            with pytest.raises(CheckpointCorruptError, match=r"leave a hole|parts are at"):
                opened.region("model", "w", offset, size)


def test_a_part_that_is_damaged_is_named(tmp_path: Path) -> None:
    info = sharded(tmp_path, torch.randn(4, 2), rows(4, 2, 2))
    empty = safetensors.torch.save({"other": torch.ones(1)})
    changed = by_hand.replace_file(tmp_path, info, "model-00001-of-00002.safetensors", empty)
    with pytest.raises(CheckpointCorruptError, match=r"model-00001-of-00002.safetensors lacks its part of .* 'w'"):
        load_all(tmp_path, changed)


def test_several_errors_at_once_leave_nothing_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verified, "_THREADS", 4)
    info = save(tmp_path, world_size=4)
    for rank in (1, 3):
        (tmp_path / info.folder / names.tensor_file(rank)).unlink()
    try:
        load_all(tmp_path, info)
    except CheckpointCorruptError as error:
        assert "state-00001.safetensors is not there" in error.message  # noqa: PT017
    else:
        pytest.fail("loaded")
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


# -- a plain checkpoint where all are to be encrypted ------------------------------------------------------


def test_plain_ones_are_passed_over_where_they_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Who can write to the storage, without a key, can't make a checkpoint that is restored."""
    strict = Keyring(Key(bytes(range(32))), refuse_plain=True)
    by_hand.write(tmp_path, objects(), step=5, keyring=KEYS)
    plain = by_hand.write(tmp_path, objects(seed=1), step=6)
    stripped = by_hand.write(tmp_path, objects(seed=2), step=7, keyring=KEYS)
    for name in [*stripped.manifests[0].files, names.rank_file(0, 1)]:
        (tmp_path / stripped.folder / name).unlink()
    by_hand.write(tmp_path, objects(seed=3), step=7)
    loaded = CheckpointStore(Storage.open(tmp_path), keyring=strict).load_latest()
    assert loaded is not None
    assert loaded.step == 5
    said = capsys.readouterr().err
    assert said.count("not encrypted") == 2
    assert "step-000007/rank-00000-of-00001.json" in said
    assert "training.default.encryption.refuse_plain is set" in said
    (found,) = [each for each in problems(Storage.open(tmp_path), plain, strict) if "not encrypted" in each]
    assert "step-000006" in found
    tolerant = CheckpointStore(Storage.open(tmp_path), keyring=KEYS).load_latest()
    assert tolerant is not None
    assert tolerant.step == 7
    shutil.rmtree(tmp_path / "step-000005")
    with pytest.raises(CheckpointCorruptError, match="All 2 checkpoints"):
        CheckpointStore(Storage.open(tmp_path), keyring=strict).load_latest()


def test_refusing_plain_ones_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUR_KEY", generate_key())
    for section, refuses in (({}, False), ({"refuse_plain": True}, True)):
        encryption = EncryptionConfig(key_env="OUR_KEY", **section)
        ring = WriterOptions.from_config({"encryption": encryption.to_dict()}).keyring
        assert ring is not None
        assert ring.refuse_plain is refuses
