"""Each thing that can be wrong in a configuration, by the text a person reads."""

# a message is easier to read, and to search for, in one line
from __future__ import annotations

import pickle
from typing import Any

import pytest

from ray_tracking.config import (
    CheckpointConfig,
    Config,
    EncryptionConfig,
    ExperimentTrackingConfig,
    ModelConfig,
    WandbConfig,
    get_config,
    section,
)
from ray_tracking.errors import ConfigError

TOP = "name, storage, seed, tags, params, model, scaling, failure, experiment_tracking, training, logging, sweep"


def problems_of(content: str, write: Any, **arguments: Any) -> list[str]:
    file = write(content)
    with pytest.raises(ConfigError) as caught:
        get_config(file=file, **arguments)
    return [line.strip().replace(str(file), "mine.yaml") for line in str(caught.value).splitlines()[1:]]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            "trainning: {}",
            f"mine.yaml, line 1: trainning is not a known key. Did you mean training? Allowed here: {TOP}.",
        ),
        (
            "scaling:\n  workrs: 3",
            "mine.yaml, line 2: scaling.workrs is not a known key. Did you mean scaling.workers? "
            "Allowed here: workers, use_gpu, resources_per_worker.",
        ),
        (
            "wandb: {enabled: true}",
            "mine.yaml, line 1: wandb is not a known key. Did you mean experiment_tracking.wandb? "
            f"Allowed here: {TOP}.",
        ),
        (
            "max-failures: 3",
            "mine.yaml, line 1: max-failures is not a known key. Did you mean failure.max_failures? "
            f"Allowed here: {TOP}.",
        ),
        ("zzzz: 1", f"mine.yaml, line 1: zzzz is not a known key. Allowed here: {TOP}."),
        (
            "training:\n  save_steps: 10",
            "mine.yaml, line 2: training.save_steps is not a known key. "
            "Did you mean training.default.save_steps? Allowed here: default.",
        ),
        (
            "training.default.mode: max",
            "mine.yaml, line 1: training.default.mode is not a known key. "
            "Dotted keys are for --set; in a file write training: {default: {mode: ...}}.",
        ),
        (
            "training:\n  defualt: {}",
            "mine.yaml, line 1: training: found a mapping with the keys default, defualt, "
            "allowed: default and other names; 'defualt' is too close to default to be another.",
        ),
        (
            "name: 5",
            "mine.yaml, line 1: name: found 5 (a whole number), allowed: text, not empty. Quote it to make it text.",
        ),
        ("name: ''", 'mine.yaml, line 1: name: found "" (text), allowed: text, not empty.'),
        ("name: null", "mine.yaml, line 1: name: found null, allowed: text, not empty."),
        (
            "scaling: {workers: 0}",
            "mine.yaml, line 1: scaling.workers: found 0 (a whole number), allowed: a whole number, at least 1.",
        ),
        (
            "scaling: {workers: two}",
            'mine.yaml, line 1: scaling.workers: found "two" (text), allowed: a whole number, at least 1.',
        ),
        (
            "scaling: {workers: true}",
            "mine.yaml, line 1: scaling.workers: found true, allowed: a whole number, at least 1.",
        ),
        (
            "scaling: {workers: 1.5}",
            "mine.yaml, line 1: scaling.workers: found 1.5 (a number), allowed: a whole number, at least 1.",
        ),
        (
            "scaling: {resources_per_worker: {GPU: -1}}",
            "mine.yaml, line 1: scaling.resources_per_worker.GPU: found -1 (a whole number), "
            "allowed: a number, at least 0.",
        ),
        (
            "scaling: {use_gpu: maybe}",
            'mine.yaml, line 1: scaling.use_gpu: found "maybe" (text), allowed: true or false.',
        ),
        (
            "scaling: [1]",
            "mine.yaml, line 1: scaling: found [1] (a list), "
            "allowed: a mapping with the keys workers, use_gpu, resources_per_worker.",
        ),
        (
            "failure: {max_failures: -2}",
            "mine.yaml, line 1: failure.max_failures: found -2 (a whole number), allowed: a whole number, at least -1.",
        ),
        (
            "seed: -1",
            "mine.yaml, line 1: seed: found -1 (a whole number), "
            "allowed: a whole number, at least 0, at most 4294967295.",
        ),
        (
            "training: {default: {mode: minn}}",
            'mine.yaml, line 1: training.default.mode: found "minn" (text), allowed: one of min, max.',
        ),
        (
            "training: {default: {save_total_limit: 0}}",
            "mine.yaml, line 1: training.default.save_total_limit: found 0 (a whole number), "
            "allowed: a whole number, at least 1, or null.",
        ),
        (
            "training: {other: {compression: gzip}}",
            'mine.yaml, line 1: training.other.compression: found "gzip" (text), allowed: zstd, or null.',
        ),
        (
            "training: {default: {save_every_seconds: .inf}}",
            "mine.yaml, line 1: training.default.save_every_seconds: found Infinity (a number), "
            "allowed: a number, above 0, or null.",
        ),
        (
            "training: {default: {encryption: {key_file: a, key_env: b}}}",
            "mine.yaml, line 1: training.default.encryption: found a mapping with the keys key_file, key_env, "
            "allowed: exactly one of key_file, key_env and key_command.",
        ),
        (
            "training: {default: {encryption: {}}}",
            "mine.yaml, line 1: training.default.encryption: found an empty mapping, "
            "allowed: exactly one of key_file, key_env and key_command.",
        ),
        (
            "experiment_tracking:\n  wandb:\n    mode: off",
            "mine.yaml, line 3: experiment_tracking.wandb.mode: found false, "
            "allowed: one of online, offline, disabled.",
        ),
        (
            "experiment_tracking:\n  wandb:\n    tags: [a,\n      3]",
            "mine.yaml, line 3: experiment_tracking.wandb.tags.1: found 3 (a whole number), "
            "allowed: text. Quote it to make it text.",
        ),
        (
            "tags: {a: 3}",
            "mine.yaml, line 1: tags.a: found 3 (a whole number), allowed: text. Quote it to make it text.",
        ),
        ("tags: {4: x}", "mine.yaml, line 1: the key tags.4 is not text, allowed: text. Quote it."),
        (
            "on: x",
            "mine.yaml: the key True is not text, allowed: text. Quote it; YAML reads on and yes as true.",
        ),
        ("model: {args: {}}", "mine.yaml, line 1: model.name is missing, allowed: text, not empty."),
        (
            "model: {name: a.b, weights: -1}",
            "mine.yaml, line 1: model.weights: found -1 (a whole number), "
            "allowed: latest, best, a step (a whole number, at least 0), a path, or null.",
        ),
        (
            "model: {name: a.b, device: 'cuda:x'}",
            'mine.yaml, line 1: model.device: found "cuda:x" (text), '
            "allowed: auto, cpu, cuda, cuda:<index>, mps or another device type of torch.",
        ),
        (
            "logging: {level: loud}",
            'mine.yaml, line 1: logging.level: found "loud" (text), allowed: one of debug, info, warning, error.',
        ),
        ("params: [1]", "mine.yaml, line 1: params: found [1] (a list), allowed: a mapping."),
        (
            "sweep: x",
            'mine.yaml, line 1: sweep: found "x" (text), allowed: a mapping with the keys metric, mode, num_samples, '
            "searcher, scheduler, max_concurrent, space, points, seed, stop, keep_best_trials, hang_secs, or null.",
        ),
    ],
)
def test_what_each_mistake_is_told_as(content, problem, write):
    assert problems_of(content, write) == [problem]


def test_all_problems_at_once_each_with_its_source(write, monkeypatch):
    monkeypatch.setenv("RAY_TRACKING_STORAGE", "x")
    write("seed: x\n", "staging.yaml")
    file = write("scaling: {workers: 0}\nwhat: 1\n")
    with pytest.raises(ConfigError) as caught:
        get_config("staging", {"failure.max_failures": "many"}, file)
    message = str(caught.value)
    assert message.startswith("The configuration is not valid (4 problems):\n")
    assert f"{file.parent}/staging.yaml, line 1: seed: found" in message
    assert f"{file}, line 1: scaling.workers: found 0" in message
    assert f"{file}, line 2: what is not a known key" in message
    assert 'overrides (--set): failure.max_failures: found "many" (text)' in message


def test_the_source_is_the_layer_that_counts(write):
    assert problems_of("seed: 3", write, overrides={"seed": "x"}) == [
        'overrides (--set): seed: found "x" (text), allowed: a whole number, at least 0, at most 4294967295.'
    ]


def test_an_error_shows_no_secret(write, monkeypatch):
    monkeypatch.setenv("MY_API_TOKEN", "planted-in-variable")
    content = (
        "experiment_tracking:\n"
        "  mlflow: {tracking_uri: ['http://me:planted-in-url@host', planted-in-variable]}\n"
        "  wandb: {api_key: planted-by-name}\n"
    )
    text = "\n".join(problems_of(content, write))
    assert "planted" not in text
    assert "experiment_tracking.wandb.api_key is not a known key" in text
    assert "http://[removed]@host" in text


def test_long_values_are_cut(write):
    (problem,) = problems_of(f"seed: {'x' * 500}", write)
    assert len(problem) < 250


def test_the_error_survives_pickling(write):
    with pytest.raises(ConfigError) as caught:
        get_config(file=write("seed: x"))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301


class TestSection:
    def test_fills_in_defaults(self):
        assert section(ExperimentTrackingConfig, None) == ExperimentTrackingConfig()
        assert section(WandbConfig, {"project": "p"}) == WandbConfig(project="p")
        assert section(CheckpointConfig, {"save_steps": 1e3}).save_steps == 1000

    def test_takes_sections_and_whole_configs(self):
        config = get_config("production")
        assert section(WandbConfig, config) is config.experiment_tracking.wandb
        assert section(WandbConfig, config["experiment_tracking"]["wandb"]).mode == "online"
        assert section(Config, config) is config
        assert section(CheckpointConfig, config) is config.training.default
        assert section(EncryptionConfig, with_key()).key_env == "K"

    @pytest.mark.parametrize(
        ("kind", "value", "key", "problem"),
        [
            (
                WandbConfig,
                {"mod": "online"},
                None,
                "experiment_tracking.wandb.mod is not a known key. Did you mean experiment_tracking.wandb.mode?",
            ),
            (
                ExperimentTrackingConfig,
                {"wandb": {"mode": 3}},
                None,
                "experiment_tracking.wandb.mode: found 3 (a whole number), allowed: one of online,",
            ),
            (
                CheckpointConfig,
                {"mode": "x"},
                None,
                'training.default.mode: found "x" (text), allowed: one of',
            ),
            (CheckpointConfig, {"mode": "x"}, "training.fine", 'training.fine.mode: found "x" (text)'),
            (WandbConfig, 3, None, "experiment_tracking.wandb: found 3 (a whole number), allowed: a mapping"),
            (
                WandbConfig,
                CheckpointConfig(),
                None,
                "experiment_tracking.wandb: found a CheckpointConfig, allow",
            ),
            (ModelConfig, None, None, "model.name is missing, allowed: text, not empty."),
        ],
    )
    def test_errors_name_the_whole_key(self, kind, value, key, problem):
        with pytest.raises(ConfigError) as caught:
            section(kind, value, key=key)
        assert str(caught.value).startswith(f"The configuration is not valid:\n  {problem}")


def with_key() -> Config:
    return get_config(overrides={"training.default.encryption.key_env": "K"})
