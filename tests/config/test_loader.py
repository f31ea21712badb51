from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ray_tracking.config import ENVIRONMENTS, Config, get_config, loader, parse_assignments, with_overrides
from ray_tracking.errors import ConfigError

DESIGN = """
name: digits
storage: ./runs
params: {lr: 0.001, epochs: 5}
scaling: {workers: 2, use_gpu: false, resources_per_worker: {CPU: 1}}
failure: {max_failures: 3}
experiment_tracking:
  tensorboard: {enabled: true, log_dir: null, update_freq: 1, flush_secs: 10}
  wandb: {enabled: false, project: digits, entity: team, tags: [a, b], mode: offline}
  mlflow: {enabled: false, tracking_uri: null, experiment_name: digits, log_models: false}
training:
  default: {save_steps: 1000, save_total_limit: 3, save_best_only: false, monitor: val/loss, mode: min,
            checkpoint_dir: null, compression: null, encryption: null}     # compression: zstd
sweep: {metric: val/loss, mode: min, num_samples: 8, searcher: optuna, scheduler: asha, max_concurrent: 2,
        space: {lr: {loguniform: [1e-5, 1e-1]}}}
"""


def error_of(**arguments: object) -> str:
    with pytest.raises(ConfigError) as caught:
        get_config(**arguments)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_base_yaml_says_what_the_models_say():
    base = loader._packaged("base")
    assert Config.model_validate({**base.data}) == Config()

    def keys(data, prefix=()):
        for key, value in data.items():
            yield (*prefix, key)
            if isinstance(value, dict):
                yield from keys(value, (*prefix, key))

    assert set(keys(base.data)) == set(keys(Config().to_dict())), "base.yaml names every key and no other"


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_packaged_environments_are_valid(name):
    assert get_config(name).name == "run"


def test_what_the_environments_are_for():
    production, testing, development = (get_config(name) for name in ("production", "testing", "development"))
    assert production.logging.json is True
    assert production.experiment_tracking.wandb.mode == "online"
    assert not production.experiment_tracking.wandb.enabled
    assert production.failure.max_failures > development.failure.max_failures
    backends = ("tensorboard", "wandb", "mlflow")
    assert [development["experiment_tracking"][name]["enabled"] for name in backends] == [True, False, False]
    assert not any(testing["experiment_tracking"][name]["enabled"] for name in backends)
    assert testing.scaling.workers == 1


def test_the_designs_example_parses_as_it_stands(write):
    config = get_config(file=write(DESIGN))
    assert config.name == "digits"
    assert config.scaling.resources_per_worker == {"CPU": 1.0}
    assert config.sweep is not None
    assert config.sweep["space"]["lr"]["loguniform"] == [1e-5, 1e-1]
    assert config.experiment_tracking.wandb.tags == ("a", "b")


def test_precedence(write, monkeypatch):
    file = write("storage: from-file\nname: from-file\nfailure: {max_failures: 7}\n")
    assert get_config("production").failure.max_failures == 10, "environment over base"
    config = get_config("production", file=file)
    assert (config.failure.max_failures, config.storage) == (7, "from-file"), "file over environment"
    assert config.logging.json is True, "what the file does not say stays"
    monkeypatch.setenv("RAY_TRACKING_STORAGE", "s3://from/variable")
    assert get_config(file=file).storage == "s3://from/variable"
    assert get_config(file=file, overrides={"storage": "from-override"}).storage == "from-override"
    monkeypatch.setenv("RAY_TRACKING_STORAGE", "")
    assert get_config(file=file).storage == "from-file", "an empty variable says nothing"


def test_environment_variable_chooses_the_environment(monkeypatch):
    assert get_config() == get_config("development")
    monkeypatch.setenv("RAY_TRACKING_ENV", "testing")
    assert get_config() == get_config("testing")
    assert get_config("production") != get_config("testing"), "an argument counts more"


def test_an_own_environment_lies_beside_the_own_file(write):
    file = write("name: mine\nseed: 1\n")
    write("seed: 2\nscaling: {workers: 4}\n", "staging.yaml")
    config = get_config("staging", file=file)
    assert (config.seed, config.scaling.workers) == (1, 4)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("prodution", "Unknown environment 'prodution'. Did you mean 'production'?"),
        ("dev", "Unknown environment 'dev'. Did you mean 'development'?"),
        ("xyz", "Unknown environment 'xyz'.\n"),
        ("../mine", "Unknown environment '../mine'.\n"),
        ("base", "Unknown environment 'base'.\n"),
    ],
)
def test_unknown_environment(name, found, write):
    file = write("name: x\n")
    write("seed: 5\n", "base.yaml")
    for arguments in ({}, {"file": file}):
        message = error_of(environment=name, **arguments)
        assert message.startswith(found.rstrip("\n"))
        assert "Allowed: development, production, testing" in message
        assert "--env or RAY_TRACKING_ENV" in message


@pytest.mark.parametrize(
    "overrides",
    [
        {"training.default.save_steps": 10},
        {"training": {"default": {"save_steps": 10}}},
        {"training.default": {"save_steps": 10}},
    ],
)
def test_overrides_nested_or_dotted(overrides):
    config = get_config(overrides=overrides)
    assert config.training.default.save_steps == 10
    assert config.training.default.monitor == "val/loss"


def test_override_values_are_pythons_own(tmp_path):
    numpy = pytest.importorskip("numpy")
    layers = (1, 2)
    overrides = {"storage": tmp_path, "seed": numpy.int64(3), "params": {"layers": layers, "a.b": 1}}
    config = get_config(overrides=overrides)
    assert (config.storage, config.seed) == (str(tmp_path), 3)
    assert config.params == {"layers": [1, 2], "a.b": 1}, "a dot in a parameter's name stays"


def test_overrides_are_copied():
    inner = {"widths": [1]}
    config = get_config(overrides={"params.net": inner})
    inner["widths"].append(2)
    assert config.params == {"net": {"widths": [1]}}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([1], "The overrides are list, not a mapping."),
        ({"a..b": 1}, "The override key 'a..b' is not a dotted key."),
        ({"": 1}, "The override key '' is not a dotted key."),
        ({1: 2}, "The override key 1 is not a dotted key."),
    ],
)
def test_overrides_that_are_none(overrides, message):
    assert error_of(overrides=overrides).startswith(message)


def test_with_overrides():
    config = get_config(overrides={"params.lr": 1})
    changed = with_overrides(config, {"training.default.mode": "max", "params.width": 8})
    assert changed.training.default.mode == "max"
    assert changed.params == {"lr": 1, "width": 8}
    assert config.params == {"lr": 1}
    with pytest.raises(ConfigError, match=r"overrides \(--set\): training.default.mode: found \"mx\""):
        with_overrides(config, {"training.default.mode": "mx"})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("-2.5E4", -2.5e4),
        ("1e3", 1000.0),
        ("3", 3),
        ("1_000", 1000),
        ("[1,2]", [1, 2]),
        ("{a: 1e5}", {"a": 1e5}),
        ("null", None),
        ("", None),
        ("true", True),
        ("off", False),
        ("a=b", "a=b"),
        ("'3'", "3"),
        ("007", "007"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("*.png", "*.png"),
        ("#1", "#1"),
        ("a #1", "a #1"),
        ("@home", "@home"),
        ("a: b: c", "a: b: c"),
        ("http://h:80/x", "http://h:80/x"),
        ("s3://b/p?a=1&b=2", "s3://b/p?a=1&b=2"),
    ],
)
def test_assignment_values(text, value):
    parsed = parse_assignments([f"params.x={text}"])
    assert parsed == {"params.x": value}
    assert type(parsed["params.x"]) is type(value)


def test_the_last_assignment_counts():
    assert parse_assignments(["a=1", "b=2", "a=3"]) == {"a": 3, "b": 2}
    overrides = parse_assignments(["params.a.b=1", "params.a=null", "params.a.b=2"])
    assert get_config(overrides=overrides).params == {"a": {"b": 2}}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("training.default.save_steps", "--set training.default.save_steps: not of the form key=value."),
        ("=3", "--set =3: not of the form key=value."),
        ("a..b=3", "--set a..b=3: not of the form key=value."),
        ("a=[1,", "--set a, line 1, column 4: not valid YAML"),
        ("a=!!python/name:os.system", "--set a, line 1: the tag !!python/name:os.system is refused."),
        ("a={b: 1, b: 2}", "--set a: a key stands twice in {b: 1, b: 2}."),
    ],
)
def test_assignments_that_are_none(assignment, message):
    with pytest.raises(ConfigError) as caught:
        parse_assignments([assignment])
    assert str(caught.value).startswith(message)


def test_a_file_that_is_not_there(tmp_path):
    message = error_of(file=tmp_path / "nope.yaml")
    assert (
        message.splitlines()[0] == f"Can't read the configuration file {tmp_path}/nope.yaml: No such file or directory."
    )


def test_a_folder_instead_of_a_file(tmp_path):
    assert error_of(file=tmp_path).startswith(f"Can't read the configuration file {tmp_path}: Is a directory.")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(write):
    file = write("name: x")
    file.chmod(0)
    assert "Permission denied" in error_of(file=file)


@pytest.mark.parametrize(("content", "what"), [("- a\n", "a list"), ("text\n", "a single value")])
def test_no_mapping_at_the_top(content, what, write):
    file = write(content)
    message = error_of(file=file)
    assert message.startswith(f"{file}, line 1: found {what} at the top, allowed: a mapping.")


def test_a_file_in_another_encoding(write):
    file = write(b"name: a\nseed: \xff\n")
    assert error_of(file=file).startswith(f"{file}, line 2: not UTF-8.")


def test_a_byte_order_mark_is_no_harm(write):
    assert get_config(file=write(b"\xef\xbb\xbfname: a\n")).name == "a"


def test_a_file_that_is_too_large(write):
    file = write("#" * 300_000)
    assert error_of(file=file) == f"{file}: larger than a configuration may be.\nAllowed: at most 256 KiB."


@pytest.mark.parametrize("content", ["", "# nothing\n", "params:\nscaling:\ntraining:\n  default:\n"])
def test_empty_files_and_sections_say_nothing(content, write):
    assert get_config("production", file=write(content)) == get_config("production")


def test_null_takes_away_what_may_be_null(write):
    file = write("training: {default: {encryption: {key_env: K}}}\nmodel: {name: a.b}\n")
    config = get_config(file=file, overrides={"training.default.encryption": None, "model": None})
    assert config.training.default.encryption is None
    assert config.model is None
    nested = get_config(file=write("params: {a: {b: 1}}"), overrides={"params.a": None})
    assert nested.params == {"a": None}


def test_defaults_are_found_inside_an_installed_package(tmp_path):
    """As in a wheel: `configs/` lies in the package, and no repository is around it."""
    root = Path(loader.__file__).parents[2]
    package = tmp_path / "ray_tracking"
    (package / "config" / "defaults").mkdir(parents=True)
    for source in (root / "ray_tracking").glob("*.py"):
        (package / source.name).write_bytes(source.read_bytes())
    for source in (root / "ray_tracking" / "config").glob("*.py"):
        (package / "config" / source.name).write_bytes(source.read_bytes())
    for source in (root / "configs").glob("*.yaml"):
        (package / "config" / "defaults" / source.name).write_bytes(source.read_bytes())
    with open(package / "config" / "defaults" / "base.yaml", "a") as base:
        base.write("\n# here\n")
    code = "import ray_tracking.config.loader as l; print(l._defaults()); print(l.get_config('production').name)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == [str(package / "config" / "defaults"), "run"]


def test_a_broken_installation_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(loader, "_defaults", lambda: tmp_path)
    assert error_of().startswith("Can't read the configuration file base.yaml (packaged)")
