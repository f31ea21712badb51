from __future__ import annotations

import json
import shlex
from typing import Any

import pytest

from ray_tracking.config import Config, get_config
from ray_tracking.config.problems import Layer, validate
from ray_tracking.errors import UsageError
from ray_tracking.runtime.jobs.agreement import check_release
from ray_tracking.runtime.jobs.noted import NotedJob, next_number, note_job, noted_jobs
from ray_tracking.runtime.jobs.request import JobRequest, check_length, check_no_secrets
from ray_tracking.storage import Storage


def request(**values: Any) -> JobRequest:
    config = get_config("testing", {"params": {"lr": 0.1, "layers": [1, 2]}, "training.long.save_steps": 5})
    given = {"run_id": "demo", "number": 2, "target": "t.py:train", "address": "http://h:1", "config": config.to_dict()}
    return JobRequest(**{**given, "versions": {"python": "3.11.2"}, **values})


def test_it_arrives_as_it_was_sent_and_its_config_is_the_same() -> None:
    sent = request()
    arrived = JobRequest.from_json(sent.to_json())
    assert arrived == sent
    assert arrived.takes_over
    assert not request(number=1).takes_over
    config = validate(Config, [Layer("", dict(arrived.config))])
    assert config == get_config("testing", {"params": {"lr": 0.1, "layers": [1, 2]}, "training.long.save_steps": 5})


def test_names_are_made_from_run_and_number() -> None:
    sent = request(run_id="my run", target="a b.py:train")
    assert sent.submission_id == "my run-2"
    words = shlex.split(sent.entrypoint("/opt/py/bin/python -X dev", debug=True))
    assert words[:5] == ["/opt/py/bin/python", "-X", "dev", "-m", "ray_tracking"]
    assert words[5:] == ["job-driver", "a b.py:train", "--run-id", "my run", "--debug"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"run_id": 1}', "nonsense"])
def test_a_damaged_request_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        JobRequest.from_json(text)


def test_fields_of_a_later_version_are_passed_over() -> None:
    document = json.loads(request().to_json()) | {"later": 1}
    assert JobRequest.from_json(json.dumps(document)) == request()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("params.api_key", "abc123def"),
        ("params.nested", {"deep": [{"db_password": "hunter2"}]}),
        ("tags", {"note": "AKIAIOSFODNN7EXAMPLE"}),
        ("storage", "s3://ACCESSKEY:sEcReTvalue@bucket/runs"),
        ("experiment_tracking.mlflow.tracking_uri", "https://me:hunter2@mlflow.example.com"),
        ("params.note", "the value of a variable"),
    ],
)
def test_a_secret_is_refused_with_the_fix(monkeypatch: pytest.MonkeyPatch, key: str, value: Any) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "the value of a variable")
    with pytest.raises(UsageError) as raised:
        check_no_secrets(get_config("testing", {key: value}), "t.py:train")
    said = str(raised.value)
    assert key.partition(".")[0] in said
    assert "environment of the cluster's nodes" in said
    for secret in ("abc123def", "hunter2", "sEcReTvalue", "AKIA", "the value of"):
        assert secret not in said


def test_names_of_secrets_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHECKPOINT_KEY", "very-secret-value")
    overrides = {"training.default.encryption": {"key_env": "CHECKPOINT_KEY"}, "params": {"token_count": 5}}
    check_no_secrets(get_config("testing", overrides), "t.py:train", "demo")


def test_a_secret_in_a_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "very-secret-value")
    with pytest.raises(UsageError) as raised:
        check_no_secrets(get_config("testing"), "t.py:train", "run-very-secret-value")
    assert "very-secret-value" not in str(raised.value)


def test_a_config_too_long_for_a_process() -> None:
    check_length(request())
    with pytest.raises(UsageError, match="shared storage"):
        check_length(request(config={"params": {"text": "x" * 120_000}}))


def test_releases_must_agree_and_the_rest_is_said() -> None:
    ours = {"python": "3.11.2", "ray": "2.60.0", "ray-tracking": "0.1.0", "torch": "2.13.0"}
    assert check_release(ours, ours) == []
    assert check_release(ours, {}) == []  # nothing known, nothing said
    differ = check_release(ours, {**ours, "python": "3.12.1", "torch": "2.12.0", "ray": "2.60.1"})
    assert [one.partition(" ")[0] for one in differ] == ["python", "torch", "ray"]
    for package, version in (("ray", "2.59.0"), ("ray-tracking", "0.2.0")):
        with pytest.raises(UsageError, match=rf"{package} {version}.*submitted with {ours[package]}"):
            check_release(ours, {**ours, package: version})


def test_jobs_are_noted_oldest_first(tmp_path: Any) -> None:
    run = Storage.open(tmp_path / "demo")
    assert noted_jobs(run) == []
    first, second = (NotedJob(f"demo-{number}", number, "http://h:1", 1.0 * number) for number in (1, 2))
    note_job(run, first)
    note_job(run, second)
    note_job(run, second)
    assert noted_jobs(run) == [first, second]
    run.write_bytes("jobs.json", b"{")
    assert noted_jobs(run) == []


@pytest.mark.parametrize(
    ("taken", "number"),
    [([], 1), (["demo-1", "demo-3"], 4), (["demo-x", "other-9", "demo", "demo-2-7"], 1), (["demo-10", "demo-9"], 11)],
)
def test_the_next_number(taken: list[str], number: int) -> None:
    assert next_number("demo", taken) == number
