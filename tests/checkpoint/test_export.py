from __future__ import annotations

import json
import os
import shutil
from collections import OrderedDict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model

from ray_tracking.checkpoint import export
from ray_tracking.checkpoint.contents import contents
from ray_tracking.checkpoint.export import export_checkpoint, size_of
from ray_tracking.checkpoint.keys import Keyring, WrongKeyError, generate_key
from ray_tracking.checkpoint.manifest import CheckpointInfo
from ray_tracking.checkpoint.store import CheckpointStore
from ray_tracking.errors import CheckpointCorruptError, CheckpointError, StorageError, UsageError
from ray_tracking.storage import Storage
from tests.monitoring.checkpoint_dirs import Tied, save, save_ranks

LAYERS = 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A tied model in two dtypes, saved by two ranks."""
    storage = Storage.open(tmp_path_factory.mktemp("ranks"))
    save_ranks(storage, "attempt-001", 10)
    return storage


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A model, its optimizer and the random states, by one rank."""
    directory = tmp_path_factory.mktemp("script")
    torch.manual_seed(1)
    save(directory, [3], model=Tied())
    return Storage.open(directory)


def newest(storage: Storage) -> CheckpointInfo:
    return CheckpointStore(storage).checkpoints()[-1]


def expected(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return dict(Tied().state_dict())


def same(loaded: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return loaded.keys() == wanted.keys() and all(
        torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype for name, value in wanted.items()
    )


@pytest.mark.parametrize("name", ["ranks", "script"])
def test_weights_as_safetensors(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    storage: Storage = request.getfixturevalue(name)
    seen: list[int] = []
    done = export_checkpoint(storage, newest(storage), tmp_path / "m.safetensors", advance=seen.append)
    wanted = expected(10 if name == "ranks" else 1)
    assert done.tied == {"head.weight": "embed.weight"}
    loaded = load_file(tmp_path / "m.safetensors")
    assert same({**loaded, "head.weight": loaded["embed.weight"]}, wanted)
    model = Tied()
    assert load_model(model, tmp_path / "m.safetensors") == (set(), [])
    assert same(dict(model.state_dict()), wanted)
    assert (tmp_path / "m.safetensors").stat().st_size == done.bytes
    assert sum(seen) == sum(tensor.nbytes for tensor in loaded.values())


@pytest.mark.parametrize("name", ["ranks", "script"])
def test_weights_as_a_torch_file(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    storage: Storage = request.getfixturevalue(name)
    done = export_checkpoint(storage, newest(storage), tmp_path / "m.pt")
    loaded = torch.load(tmp_path / "m.pt", weights_only=True)
    assert same(dict(loaded), expected(10 if name == "ranks" else 1))
    assert loaded["head.weight"].data_ptr() == loaded["embed.weight"].data_ptr()
    assert done.bytes == (tmp_path / "m.pt").stat().st_size < 8000  # the tied weight once, and no more than the weights
    Tied().load_state_dict(loaded)


def test_everything_as_a_torch_file(ranks: Storage, script: Storage, tmp_path: Path) -> None:
    export_checkpoint(script, newest(script), tmp_path / "a.pt", what="all")
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    assert (loaded["step"], loaded["epoch"], loaded["metrics"]) == (3, 0, {"loss": 1 / 3})
    model = Tied()
    model.load_state_dict(loaded["model"])
    torch.optim.AdamW(model.parameters()).load_state_dict(loaded["optimizer"])
    torch.set_rng_state(loaded["rng"]["torch"])
    export_checkpoint(ranks, newest(ranks), tmp_path / "b.pt", what="all")
    loaded = torch.load(tmp_path / "b.pt", weights_only=True)
    assert (loaded["world_size"], loaded["loader"], loaded["ranks"][1]["loader"]) == (2, {"rank": 0}, {"rank": 1})


def test_everything_as_safetensors(ranks: Storage, tmp_path: Path) -> None:
    export_checkpoint(ranks, newest(ranks), tmp_path / "a.safetensors", what="all")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
        weight = file.get_tensor("model.layers.0.weight")
    assert torch.equal(weight, expected(10)["layers.0.weight"])
    assert {"rng.torch", "ranks.1.rng.torch", "model.embed.weight"} <= names
    assert metadata["model.head.weight"] == "model.embed.weight"
    rest = json.loads(metadata["ray_tracking"])
    assert (rest["step"], rest["loader"]) == (10, {"rank": 0})


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_from_an_encrypted_one(tmp_path: Path, compression: str | None) -> None:
    (tmp_path / "key").touch(mode=0o600)
    (tmp_path / "key").write_text(generate_key())
    section = {"key_file": str(tmp_path / "key")}
    torch.manual_seed(4)
    save(tmp_path / "sealed", [1], model=Tied(), compression=compression, encryption=section)
    storage = Storage.open(tmp_path / "sealed")
    with pytest.raises(WrongKeyError):
        export_checkpoint(storage, newest(storage), tmp_path / "m.pt")
    assert not (tmp_path / "m.pt").exists()
    with pytest.raises(WrongKeyError):
        contents(storage, newest(storage))
    keyring = Keyring.from_config(section)
    export_checkpoint(storage, newest(storage), tmp_path / "m.pt", keyring=keyring)
    assert same(dict(torch.load(tmp_path / "m.pt", weights_only=True)), expected(4))
    inside = contents(storage, newest(storage), keyring)
    assert {tensor.name for tensor in inside.tensors if tensor.object == "model"} == set(expected(4)) - {"head.weight"}


def test_contents_of_compressed_and_of_several_ranks(ranks: Storage, tmp_path: Path) -> None:
    inside = contents(ranks, newest(ranks))
    weights = {tensor.name: tensor for tensor in inside.tensors if tensor.object == "model"}
    assert weights.keys() == expected(10).keys() - {"head.weight"}
    assert {tensor.rank for tensor in weights.values()} == {0, 1}
    assert (weights["layers.0.weight"].dtype, weights["layers.0.weight"].shape) == ("BF16", (4, 4))
    assert [(each.name, each.ranks, each.shared) for each in inside.objects] == [
        ("loader", (0, 1), 0), ("model", (), 1), ("rng", (0, 1), 0),
    ]  # fmt: skip
    save(tmp_path / "small", [1], compression="zstd")
    storage = Storage.open(tmp_path / "small")
    assert {tensor.name for tensor in contents(storage, newest(storage)).tensors} >= {"weight", "bias"}


def test_a_header_that_is_none_is_named(script: Storage, tmp_path: Path) -> None:
    shutil.copytree(script.path(), tmp_path / "copy")
    storage = Storage.open(tmp_path / "copy")
    info = newest(storage)
    file = tmp_path / "copy" / info.folder / "model.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(CheckpointCorruptError, match=r"model\.safetensors is not a safetensors file"):
        contents(storage, info)


def test_there_whole_or_not_at_all(script: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up in the middle, for both formats; what was there before stays."""
    written = [0]
    write = os.write

    def full(file: int, data: Any) -> int:
        written[0] += len(data)
        if written[0] > 600:
            raise OSError(28, "No space left on device")
        return write(file, data)

    for name in ("m.safetensors", "m.pt"):
        (tmp_path / name).write_bytes(b"before")
        written[0] = 0
        info = newest(script)
        with monkeypatch.context() as patch:
            patch.setattr("os.write", full)
            with pytest.raises(StorageError, match="No space left"):
                export_checkpoint(script, info, tmp_path / name, force=True)
        assert (tmp_path / name).read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.pt", "m.safetensors"]


def test_room_is_looked_at_first(script: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = size_of(newest(script), "model")
    assert 0 < needed < size_of(newest(script), "all")
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, needed))  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match=f"needs {needed} bytes and there are {needed} left"):
        export_checkpoint(script, newest(script), tmp_path / "m.pt")
    assert list(tmp_path.iterdir()) == []


def test_what_a_format_can_not_hold(tmp_path: Path) -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))
            self.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
            self.register_buffer("small", torch.ones(3).to(torch.float8_e4m3fn))

        def get_extra_state(self) -> Any:
            return {"version": 3}

        def set_extra_state(self, state: Any) -> None: ...

    model = Odd()
    save(tmp_path / "odd", [1], model=model)
    storage = Storage.open(tmp_path / "odd")
    with pytest.raises(CheckpointError, match=r"phase is torch\.complex64"):
        export_checkpoint(storage, newest(storage), tmp_path / "m.safetensors")
    export_checkpoint(storage, newest(storage), tmp_path / "m.pt")
    assert torch.load(tmp_path / "m.pt", weights_only=True)["_extra_state"] == {"version": 3}
    del model.phase
    save(tmp_path / "less", [1], model=model)
    storage = Storage.open(tmp_path / "less")
    done = export_checkpoint(storage, newest(storage), tmp_path / "m.safetensors")
    assert done.left_out == ("_extra_state.version",)
    assert load_file(tmp_path / "m.safetensors")["small"].dtype == torch.float8_e4m3fn


def test_a_checkpoint_without_a_model(tmp_path: Path) -> None:
    from ray_tracking.checkpoint import create_checkpoint_manager

    with create_checkpoint_manager({"checkpoint_dir": str(tmp_path / "c")}) as manager:
        manager.save_checkpoint(step=1, ema={"decay": 0.9})
    storage = Storage.open(tmp_path / "c")
    with pytest.raises(CheckpointError, match="holds no model, only: ema, rng"):
        export_checkpoint(storage, newest(storage), tmp_path / "m.pt")


def test_plain_values_for_torch() -> None:
    """Nothing that `weights_only` refuses is left, and nothing is lost that it can say."""
    state = OrderedDict(
        a=np.arange(3, dtype=np.uint32), b=np.float32(1.5), c=deque([1, 2]), d={3}, e=b"ab", f=(None, 2j)
    )
    state._metadata = {"": {"version": 2}}  # type: ignore[attr-defined]
    plain = export._plain(state, set())
    assert plain._metadata == {"": {"version": 2}}
    assert plain["a"].tolist() == [0, 1, 2]
    assert plain["e"].tolist() == [97, 98]
    assert (plain["b"], plain["c"], plain["d"], plain["f"]) == (1.5, [1, 2], [3], (None, 2j))
    assert export._plain({"t": np.array(["x", "y"])}, set()) == {"t": ["x", "y"]}


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt"])
def test_wrong_outputs(script: Storage, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    for path in (tmp_path / name, tmp_path / "none" / name, tmp_path / "m.zip"):
        with pytest.raises(UsageError):
            export_checkpoint(script, newest(script), path, force=True)
