from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from ray_tracking.checkpoint.keys import Key, Keyring, WrongKeyError
from ray_tracking.checkpoint.manager import CheckpointManager
from ray_tracking.checkpoint.model import create_model, load_weights
from ray_tracking.checkpoint.store import CheckpointStore
from ray_tracking.errors import CheckpointCorruptError, CheckpointError, ConfigError
from ray_tracking.storage import Storage

from . import by_hand

LINEAR: dict[str, Any] = {
    "name": "torch.nn.Linear",
    "args": {"in_features": 3, "out_features": 2},
    "device": "cpu",
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Steps 1, 2, 3 with weights of that value; step 2 is the best."""
    root = tmp_path / "kept"
    with CheckpointManager(CheckpointStore(Storage.open(root))) as manager:
        for step, loss in ((1, 0.3), (2, 0.1), (3, 0.2)):
            state = {"weight": torch.full((2, 3), float(step)), "bias": torch.zeros(2)}
            manager.save_checkpoint(model=state, step=step, metrics={"val_loss": loss})
    return root


def value(model: nn.Module) -> float:
    weight = model.state_dict()["weight"]
    assert torch.equal(weight, torch.full((2, 3), weight[0, 0].item()))
    return float(weight[0, 0])


def test_by_dotted_name_and_by_file(tmp_path: Path) -> None:
    model = create_model(LINEAR)
    assert isinstance(model, nn.Linear)
    assert model.weight.device.type == "cpu"
    file = tmp_path / "net.py"
    file.write_text("import torch\nclass Net(torch.nn.Linear):\n    class Inner(torch.nn.Identity): pass\n")
    assert type(create_model({**LINEAR, "name": f"{file}:Net"})).__name__ == "Net"
    assert type(create_model(f"{file}:Net.Inner")).__name__ == "Inner"
    assert isinstance(create_model({"name": "torch.nn.ReLU", "device": None}), nn.ReLU)


def test_weights(saved: Path) -> None:
    config = {**LINEAR, "checkpoint_dir": str(saved)}
    assert value(create_model({**config, "weights": "latest"})) == 3
    assert value(create_model({**config, "weights": "best"})) == 2
    assert value(create_model({**config, "weights": "best", "mode": "max"})) == 1
    assert value(create_model({**config, "weights": 1})) == 1
    assert value(create_model({**config, "weights": "1"})) == 1
    assert value(create_model({**LINEAR, "weights": str(saved / "step-000002")})) == 2
    assert value(create_model({**LINEAR, "weights": str(saved / "step-000002" / "model.safetensors")})) == 2


def test_a_plain_safetensors_file_with_the_ddp_prefix(tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file({"module.weight": torch.full((2, 3), 9.0), "module.bias": torch.zeros(2)}, path)
    assert value(create_model({**LINEAR, "weights": str(path)})) == 9


def test_a_plain_file_with_tied_names(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)
            self.b.weight = self.a.weight

    path = tmp_path / "tied.safetensors"
    safetensors.torch.save_model(Tied(), str(path))
    loaded = load_weights(str(path), {}).model_state
    assert sorted(loaded) == ["a.bias", "a.weight", "b.bias", "b.weight"]
    assert loaded["a.weight"] is loaded["b.weight"]
    path.unlink()
    assert loaded["a.weight"].isfinite().all()


KEYS = Keyring(Key(bytes(range(32))))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("how", [{}, {"compression": "zstd"}, {"keyring": KEYS}], ids=["plain", "zstd", "encrypted"])
def test_a_checkpoint_of_any_layout(tmp_path: Path, how: dict[str, Any], world_size: int) -> None:
    state = {"weight": torch.full((2, 3), 8.0), "bias": torch.zeros(2)}
    info = by_hand.write(tmp_path, {"model": state, "ema": state}, world_size=world_size, **how)
    files = sorted(path.name for path in (tmp_path / info.folder).glob("model*"))
    assert len(files) == world_size
    for weights in (f"{tmp_path}/{info.folder}", *(f"{tmp_path}/{info.folder}/{file}" for file in files)):
        assert value(create_model({**LINEAR, "weights": weights}, keyring=KEYS)) == 8
    assert value(create_model({**LINEAR, "weights": "latest", "checkpoint_dir": str(tmp_path)}, keyring=KEYS)) == 8
    if "keyring" in how:
        with pytest.raises(WrongKeyError, match="is encrypted for"):
            create_model({**LINEAR, "weights": weights})
    path = tmp_path / info.folder / files[-1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointCorruptError, match=f"{path}"):
        create_model({**LINEAR, "weights": str(path)}, keyring=KEYS)


def test_a_sealed_file_alone(tmp_path: Path) -> None:
    state = {"weight": torch.full((2, 3), 8.0), "bias": torch.zeros(2)}
    info = by_hand.write(tmp_path / "a", {"model": state}, compression="zstd")
    path = (tmp_path / "a" / info.folder / "model.safetensors.zst").rename(tmp_path / "model.safetensors.zst")
    with pytest.raises(CheckpointError, match="is compressed or encrypted and lies in no complete checkpoint"):
        create_model({**LINEAR, "weights": str(path)})


def test_a_plain_file_of_a_checkpoint_alone(tmp_path: Path) -> None:
    """As someone copies it elsewhere: checked as any safetensors file is."""
    state = {"weight": torch.full((2, 3), 8.0), "bias": torch.zeros(2)}
    info = by_hand.write(tmp_path / "a", {"model": state})
    path = (tmp_path / "a" / info.folder / "model.safetensors").rename(tmp_path / "mine.safetensors")
    (tmp_path / "link.safetensors").symlink_to(path)
    assert value(create_model({**LINEAR, "weights": str(tmp_path / "link.safetensors")})) == 8
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointCorruptError, match=r"mine\.safetensors is not a safetensors file"):
        create_model({**LINEAR, "weights": str(path)})
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointCorruptError, match=r"mine\.safetensors can't be read: it is a folder"):
        create_model({**LINEAR, "weights": str(path)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "torch.nn.Liner"}, "did you mean 'Linear'"),
        ({"name": "trch.nn.Linear"}, "no module 'trch'"),
        ({"name": "Linear"}, "no module 'Linear'"),
        ({"name": None}, "allowed: 'package.module.Class'"),
        ({"name": "torch.nn.functional.relu"}, "relu"),
        ({"name": "torch.pi"}, "must be a class or function"),
        ({"name": "collections.OrderedDict", "args": {}}, "must make a torch.nn.Module"),
        ({"name": "nowhere.py:Net"}, "no Python file"),
        ({"args": {"in_features": 3, "out": 2}}, r"Allowed: Linear\(in_features: int, out_features: int"),
        ({"args": {"in_features": -3, "out_features": 2}}, "failed"),
        ({"device": "gpu"}, "model.device: found 'gpu'"),
        ({"device": "cuda:99"}, "not here"),
        ({"weight": "latest"}, "did you mean 'weights'"),
        ({"weights": True}, "model.weights: found True"),
        ({"weights": "model.pt"}, "looks like a pickle"),
    ],
)
def test_what_is_configured_wrongly_is_said(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        create_model({**LINEAR, **change})


def test_a_broken_user_file(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text("import no_such_package_anywhere\n")
    with pytest.raises(ConfigError, match="no_such_package_anywhere"):
        create_model(f"{file}:Net")
    file.write_text("1 / 0\n")
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        create_model(f"{file}:Net")


def test_missing_weights(saved: Path, tmp_path: Path) -> None:
    config = {**LINEAR, "checkpoint_dir": str(saved)}
    with pytest.raises(CheckpointError, match="complete checkpoints there: 1, 2, 3"):
        create_model({**config, "weights": 7})
    with pytest.raises(CheckpointError, match=r"Set model\.monitor to one of: val_loss"):
        create_model({**config, "weights": "best", "monitor": "val/acc"})
    with pytest.raises(CheckpointError, match="complete checkpoints there: none"):
        create_model({**LINEAR, "weights": "latest", "checkpoint_dir": str(tmp_path / "empty")})
    with pytest.raises(CheckpointError, match="there is no file"):
        create_model({**LINEAR, "weights": str(tmp_path / "x.safetensors")})
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        create_model({**LINEAR, "weights": str(saved / "step-000009")})
    with pytest.raises(CheckpointError, match="not a complete checkpoint: its name"):
        create_model({**LINEAR, "weights": str(tmp_path)})
    wider = {"in_features": 4, "out_features": 2}
    with pytest.raises(CheckpointError, match=r"weight is \[2, 3\] in the checkpoint and \[2, 4\]"):
        create_model({**config, "args": wider, "weights": "latest"})


class _Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_a_pickle_under_a_safetensors_name_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(pickle.dumps(_Payload(tmp_path / "ran")))
    with pytest.raises(CheckpointCorruptError, match=r"x\.safetensors is not a safetensors file"):
        create_model({**LINEAR, "weights": str(path)})
    assert not (tmp_path / "ran").exists()
