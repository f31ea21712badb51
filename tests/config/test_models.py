from __future__ import annotations

import ast
import datetime
import inspect
import json
import pickle
import subprocess
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest
from pydantic import ValidationError

from ray_tracking.config import Config, ModelConfig, Section, get_config, models


@pytest.fixture
def config() -> Config:
    return get_config(
        overrides={
            "params.lr": 0.1,
            "model": {"name": "a.B", "args": {"width": 2}},
            "training.fine.save_steps": 5,
        }
    )


def test_reads_as_a_mapping(config):
    assert isinstance(config, Mapping)
    assert config["experiment_tracking"]["tensorboard"]["enabled"] is True
    assert config["training"]["default"] is config.training.default
    assert config.get("nothing", 3) == 3
    assert config.get("name") == "run"
    assert "params" in config
    assert "to_dict" not in config
    assert "model_config" not in config
    assert list(config["training"]) == ["default", "fine"]
    assert config["training"]["fine"].save_steps == 5
    assert dict(config) == dict(config.items())
    assert len(config) == len(list(config)) == len(config.to_dict())
    with pytest.raises(KeyError, match="nothing"):
        config["nothing"]


def test_spreads_into_keyword_arguments(config):
    def create(name, args, weights, device, **_lookup):
        return name, args["width"], weights, device

    assert create(**config["model"]) == ("a.B", 2, None, "auto")


def test_is_frozen(config):
    with pytest.raises(ValidationError):
        config.name = "other"
    with pytest.raises(ValidationError):
        config.training.default.save_steps = 5
    with pytest.raises(TypeError):
        config["name"] = "other"


def test_to_dict_is_plain_json(config):
    changed = config.model_copy(
        update={"params": {"day": datetime.date(2024, 1, 2), "path": Path("a/b"), "set": {1}, 3: (1, 2)}}
    )
    plain = changed.to_dict()
    assert plain["params"] == {"day": "2024-01-02", "path": "a/b", "set": [1], "3": [1, 2]}
    assert json.loads(json.dumps(plain)) == plain
    assert Config.model_validate(config.to_dict()) == config


def test_pickles(config):
    cloudpickle = pytest.importorskip("cloudpickle")
    assert pickle.loads(cloudpickle.dumps(config)) == config  # noqa: S301
    assert pickle.loads(pickle.dumps(config)).training.fine == config.training.fine  # noqa: S301


@pytest.mark.parametrize("weights", [None, "latest", "best", 0, 120, "some/path"])
def test_weights(weights):
    assert ModelConfig(name="a.B", weights=weights).weights == weights


@pytest.mark.parametrize("weights", ["", -1, True, 1.5, ["latest"]])
def test_not_weights(weights):
    with pytest.raises(ValidationError):
        ModelConfig(name="a.B", weights=weights)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1", "MPS"])
def test_device(device):
    assert ModelConfig(name="a.B", device=device).device == device.lower()


def sections() -> list[type[Section]]:
    return [kind for kind in vars(models).values() if inspect.isclass(kind) and issubclass(kind, Section)]


def test_every_field_is_described():
    tree = ast.parse(inspect.getsource(models))
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for kind in sections():
        body = classes[kind.__name__].body
        described = {
            node.target.id
            for node, following in pairwise(body)
            if isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        }
        assert set(kind.model_fields) <= described, f"{kind.__name__}: a field without a word about it"


def test_no_key_hides_a_way_of_reading():
    """`section.items` must stay the method, whatever keys are added."""
    for kind in sections():
        assert not {"get", "items", "keys", "values", "to_dict"} & set(kind.model_fields)


def test_importing_is_quiet_and_light():
    code = (
        "import warnings, sys; warnings.simplefilter('error')\n"
        "import ray_tracking; assert 'pydantic' not in sys.modules\n"
        "import ray_tracking.config; heavy = {'torch', 'ray', 'pyarrow', 'numpy', 'wandb', 'mlflow'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    root = Path(models.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
