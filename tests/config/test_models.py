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
from typing import Any

import pytest
from pydantic import ValidationError

from ray_tracking.config import Config, ModelConfig, Section, get_config, models, redact, sweep, with_overrides
from ray_tracking.errors import ConfigError


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


def refusal(**default: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        get_config("production", {"training.default": default})
    return str(caught.value).removeprefix("The configuration is not valid:\n  overrides (--set): training.default")


@pytest.mark.parametrize(
    ("default", "text"),
    [
        (
            {"save_steps": None, "save_on_preemption": False, "save_on_exception": False, "save_at_end": False},
            ": found a mapping with the keys save_steps, save_every_seconds, save_on_epoch_end, save_on_preemption, "
            "save_on_exception, save_at_end, allowed: at least one of them on, such as save_steps: 1000, "
            "or nothing is ever saved.",
        ),
        (
            {"save_total_limit": 7, "keep_last": 5, "keep_best": 3},
            ": found a mapping with the keys save_total_limit, keep_last, keep_best, allowed: "
            "a save_total_limit of at least 8 (keep_last 5 + keep_best 3) instead of 7, or null.",
        ),
        (
            {"save_total_limit": 5, "keep_last": 5},
            ": found a mapping with the keys save_total_limit, keep_last, allowed: "
            "a save_total_limit of at least 6 (keep_last 5 + the best) instead of 5, or null.",
        ),
        ({"keep_last": 0}, ".keep_last: found 0 (a whole number), allowed: a whole number, at least 1, or null."),
        ({"save_best_only": True, "monitor": ""}, '.monitor: found "" (text), allowed: text, not empty.'),
        ({"keep_best": 2, "monitor": None}, ".monitor: found null, allowed: text, not empty."),
        ({"when_busy": "drop"}, '.when_busy: found "drop" (text), allowed: one of wait, skip, queue.'),
        ({"on_write_failure": "x"}, '.on_write_failure: found "x" (text), allowed: one of continue, fail.'),
        ({"write_deadline_secs": 0}, ".write_deadline_secs: found 0 (a whole number), allowed: a number, above 0."),
        (
            {"encryption": {"recipients": [{"key_env": "A"}]}},
            ".encryption: found a mapping with the keys recipients, "
            "allowed: exactly one of key_file, key_env and key_command.",
        ),
        (
            {"encryption": {"key_env": "A", "recipients": [{"key_env": "B"}, {"key_env": "C", "key_file": "c"}]}},
            ".encryption.recipients.1: found a mapping with the keys key_env, key_file, "
            "allowed: exactly one of key_file, key_env and key_command.",
        ),
        (
            {"encryption": {"key_env": "A", "old_keys": [{}]}},
            ".encryption.old_keys.0: found an empty mapping, "
            "allowed: exactly one of key_file, key_env and key_command.",
        ),
        (
            {"encryption": {"key_env": "A", "old_keys": {"key_env": "B"}}},
            ".encryption.old_keys: found a mapping with the keys key_env, "
            "allowed: a list, each item a mapping with the keys key_file, key_env, key_command.",
        ),
        (
            {"encryption": {"key_env": "A", "old_keys": [{"key_fil": "B"}]}},
            ".encryption.old_keys.0.key_fil is not a known key. "
            "Did you mean training.default.encryption.old_keys.0.key_file? "
            "Allowed here: key_file, key_env, key_command.",
        ),
    ],
)
def test_checkpoint_rules_that_cannot_be(default, text):
    assert refusal(**default) == text


def test_contradictions_are_told_together_and_by_the_name_of_the_strategy():
    never = {"save_steps": None, "save_on_preemption": False, "save_on_exception": False, "save_at_end": False}
    with pytest.raises(ConfigError, match=r"2 problems") as caught:
        get_config(overrides={"training.fine": {**never, "save_total_limit": 1, "keep_last": 4}})
    assert str(caught.value).count("training.fine: found") == 2


def test_the_packaged_limit_gives_way():
    """3 stands in base.yaml: whoever sets keep_last or keep_best need not take it back."""
    section = get_config(overrides={"training.default": {"keep_last": 10, "keep_best": 5}}).training.default
    assert (section.save_total_limit, section.keep_last, section.keep_best) == (3, 10, 5)
    for limit in (None, 15):
        get_config(overrides={"training.default": {"save_total_limit": limit, "keep_last": 10, "keep_best": 5}})


def test_keys_of_an_encryption_survive_all_ways():
    keys = {"key_file": "a", "recipients": [{"key_env": "B"}], "old_keys": [{"key_command": "c"}, {"key_file": "d"}]}
    config = get_config(overrides={"training.default.encryption": keys})
    encryption = config.training.default.encryption
    assert [source.key_command for source in encryption.old_keys] == ["c", None]
    assert Config.model_validate(config.to_dict()) == config
    assert with_overrides(config, {"seed": 1}).training == config.training
    assert redact(config.to_dict()) == config.to_dict(), "where a key comes from is no secret"


def sections() -> list[type[Section]]:
    return [kind for kind in vars(models).values() if inspect.isclass(kind) and issubclass(kind, Section)]


def test_every_field_is_described():
    trees = [ast.parse(inspect.getsource(module)) for module in (models, sweep)]
    classes = {node.name: node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for kind in sections():
        bodies = [classes[each.__name__].body for each in kind.__mro__ if each.__name__ in classes]
        described = {
            node.target.id
            for body in bodies
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
