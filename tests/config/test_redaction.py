from __future__ import annotations

import json
import time
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_tracking.config import REMOVED, get_config, redact, redact_text
from ray_tracking.config.secret_names import is_secret_name, is_strong_name

SECRET_NAMES = (
    *("password", "passwd", "db_password", "dbPassword", "DB-PASSWORD", "smtp.password"),
    *("secret", "client_secret", "clientSecret", "token", "api_token", "HF_TOKEN"),
    *("accessToken", "api_key", "apiKey", "API-KEY", "apikey", "OPENAI_API_KEY"),
    *("x-api-key", "access_key", "aws_access_key_id", "AWS_SECRET_ACCESS_KEY", "private_key", "ssh_key"),
    *("credentials", "credential", "authorization", "Authorization", "auth", "dsn"),
    *("sentry.dsn", "connection_string", "ConnectionString", "cookie", "Set-Cookie", "passphrase"),
    "db_pass",
)
HARMLESS_NAMES = (
    *("tokenizer", "max_tokens", "num_tokens", "tokens", "key_file", "key_env"),
    *("key_command", "key", "keys", "monitor", "author", "secretary"),
    *("keyboard", "monkey", "token_count", "password_file", "TOKEN_PATH", "RAY_AUTH_MODE"),
    *("compass", "bypass", "forward_pass", "pwd", "cookies_enabled", "lr"),
    "train/loss",
)


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_secret_names(name):
    assert is_secret_name(name)
    assert redact({name: "planted"}) == {name: REMOVED}
    assert redact({"a": [{name: {"deep": ["planted"]}}]}) == {"a": [{name: REMOVED}]}
    assert redact([(name, "planted")]) == [(name, REMOVED)]
    assert redact({"env": [{"name": name, "value": "planted"}]}) == {"env": [{"name": name, "value": REMOVED}]}
    assert redact({name: None}) == {name: None}
    assert redact({name: True}) == {name: True}


@pytest.mark.parametrize("name", HARMLESS_NAMES)
def test_harmless_names(name):
    assert not is_secret_name(name)
    assert redact({name: "kept"}) == {name: "kept"}
    assert redact_text(f"{name}=kept") == f"{name}=kept"


def test_numbers_are_secret_only_as_passwords():
    assert redact({"token": 5, "password": 12345, "seed": 3}) == {"token": 5, "password": REMOVED, "seed": 3}
    assert redact_text("token=5 password=12345") == f"token=5 password={REMOVED}"
    assert is_strong_name("db_password")
    assert not is_strong_name("pad_token")


TEXTS = [
    ("password=planted", f"password={REMOVED}"),
    ("password = planted, then", f"password = {REMOVED} then"),
    ('{"password": "pla\\"nted", "x": 1}', f'{{"password": {REMOVED}, "x": 1}}'),
    ("connect(password='planted', host='h')", f"connect(password={REMOVED}, host='h')"),
    ("os.environ['DB_PASSWORD'] = 'planted'", f"os.environ['DB_PASSWORD'] = {REMOVED}"),
    ('log "{\\"api_key\\": \\"planted\\"}" end', f'log "{{\\"api_key\\": {REMOVED}}}" end'),
    ('credentials={"a": "planted", "b": "planted"} z', f"credentials={REMOVED} z"),
    ("Authorization: Bearer planted", f"Authorization: {REMOVED}"),
    ("Authorization: Basic cGxhbnRlZA==", f"Authorization: {REMOVED}"),
    ("sent bearer planted-planted-planted", f"sent bearer {REMOVED}"),
    ("Cookie: a=planted; b=planted\nnext", f"Cookie: {REMOVED}\nnext"),
    ("run --api-key planted --lr 0.1", f"run --api-key {REMOVED} --lr 0.1"),
    ("run --api-key=planted --lr 0.1", f"run --api-key={REMOVED} --lr 0.1"),
    ("['--password', 'planted', '--lr', '3']", f"['--password', {REMOVED}, '--lr', '3']"),
    ('password: "planted and cut off', f"password: {REMOVED}"),
    ("postgres://me:planted@host:5432/db", f"postgres://{REMOVED}@host:5432/db"),
    ("postgres://me:pl@nted@host/db", f"postgres://{REMOVED}@host/db"),
    ("postgres://me:pl/nted@host/db", f"postgres://{REMOVED}@host/db"),
    ("https://planted@github.com/a/b.git", f"https://{REMOVED}@github.com/a/b.git"),
    ("url=https://me:planted@host/", f"url=https://{REMOVED}@host/"),
    (
        "s3://b?access_key=planted&secret_key=planted&x=1",
        f"s3://b?access_key={REMOVED}&secret_key={REMOVED}&x=1",
    ),
    ("https://h/?a=1&X-Amz-Signature=planted&b=2", f"https://h/?a=1&X-Amz-Signature={REMOVED}&b=2"),
    ("key ghp_" + "a1" * 18 + " used", f"key {REMOVED} used"),
    ("sk-proj-" + "a1" * 12, REMOVED),
    ("AKIAIOSFODNN7EXAMPLE", REMOVED),
    ("xoxb-123456789012-abc", REMOVED),
    ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc_-d", REMOVED),
    ("hf_" + "aB" * 17, REMOVED),
    ("-----BEGIN RSA PRIVATE KEY-----\nplanted\n-----END RSA PRIVATE KEY-----\nx", f"{REMOVED}\nx"),
    ("-----BEGIN PRIVATE KEY-----\nplanted cut off", REMOVED),
]


@pytest.mark.parametrize(("text", "clean"), TEXTS)
def test_texts(text, clean):
    assert redact_text(text) == clean
    assert redact_text(clean) == clean
    assert redact({"note": [text]}) == {"note": [clean]}
    assert redact(text.encode()) == clean.encode()


@pytest.mark.parametrize(
    "text",
    [
        "https://host:8080/path/@user",
        "http://127.0.0.1:5000/#/experiments/3",
        "s3://bucket/runs?endpoint_override=127.0.0.1:7480&scheme=http",
        "step 120: loss=0.25, 31.5 it/s",
        "task-force sk-learn desk-lamp-with-long-name",
        "me@host.org",
        "C:\\runs\\one",
        "a == b; key: value",
        "",
    ],
)
def test_texts_that_stay(text):
    assert redact_text(text) == text


def test_command_lines_as_lists():
    assert redact(["train", "--token", "planted", "--lr", "3"]) == ["train", "--token", REMOVED, "--lr", "3"]
    assert redact(["train", "--token", "--lr"]) == ["train", "--token", "--lr"]


def test_values_of_secret_environment_variables(monkeypatch):
    planted = 'pl/an t"ed\\9'
    monkeypatch.setenv("WANDB_API_KEY", planted)
    monkeypatch.setenv("MY_LICENSE_KEY", "planted-license")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    value = {"a": f"x{planted}y", "b": json.dumps(planted), "c": quote(planted, safe=""), "d": repr(planted)}
    assert redact(value) == {"a": f"x{REMOVED}y", "b": f'"{REMOVED}"', "c": REMOVED, "d": f"'{REMOVED}'"}
    assert redact_text("planted-license abc disabled") == f"{REMOVED} abc disabled"
    assert redact({planted: 1, Path("runs/planted-license"): 2}) == {
        REMOVED: 1,
        Path("runs/planted-license"): 2,
    }
    assert redact(Path("runs/planted-license/x")) == f"runs/{REMOVED}/x"


@pytest.mark.parametrize("value", ["removed]", "[removed", "[removed]", "emoved][", "[removed][removed]"])
def test_a_variable_like_the_mark_does_no_harm(value, monkeypatch):
    monkeypatch.setenv("ODD_TOKEN", value)
    once = redact_text(f"a {value} password=x [removed] b")
    assert once.startswith("a [removed]")
    assert redact_text(once) == once


class Pair(NamedTuple):
    left: Any
    right: Any


def test_types_stay():
    path = PurePosixPath("a/b")
    value = {
        "list": [1],
        "tuple": (1, "a"),
        "set": {"a"},
        "pair": Pair(1, "password=x"),
        "path": path,
        3: None,
    }
    clean = redact(value)
    assert clean == {**value, "pair": Pair(1, f"password={REMOVED}")}
    assert [type(item) for item in clean.values()] == [type(item) for item in value.values()]
    thing = object()
    assert redact(thing) is thing


def test_nothing_is_changed_in_place():
    value = {"password": "x", "list": ["--token", "y"]}
    redact(value)
    assert value == {"password": "x", "list": ["--token", "y"]}


def test_what_is_nested_too_deeply_to_look_into_is_removed():
    value: Any = "planted"
    for _ in range(500):
        value = [value]
    assert "planted" not in repr(redact(value))
    endless: list[Any] = []
    endless.append(endless)
    assert REMOVED in repr(redact(endless))


def test_a_config_as_it_stands(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "planted-in-variable")
    overrides = {
        "params": {"db": {"password": "planted-by-name"}, "tokenizer": "bert", "max_tokens": 512},
        "tags": {"note": "used planted-in-variable"},
        "experiment_tracking.mlflow.tracking_uri": "https://me:planted-in-url@mlflow.example/",
        "training.default.encryption.key_env": "MY_KEY",
    }
    config = get_config(overrides=overrides)
    clean = redact(config)
    assert "planted" not in json.dumps(clean)
    assert redact(config.to_dict()) == json.loads(json.dumps(clean))
    assert clean["params"]["tokenizer"] == "bert"
    assert clean["params"]["max_tokens"] == 512
    assert clean["training"]["default"]["encryption"]["key_env"] == "MY_KEY"
    assert clean["training"]["default"]["monitor"] == "val/loss"
    assert clean["experiment_tracking"]["mlflow"]["tracking_uri"] == f"https://{REMOVED}@mlflow.example/"


def test_large_and_odd_texts_take_no_long():
    for text in (
        "a" * 300_000,
        "a-" * 100_000,
        "a://" * 50_000,
        "token=x " * 30_000,
        "http://" + "a@" * 50_000,
    ):
        started = time.thread_time()
        redact_text(text)
        assert time.thread_time() - started < 5


# No deadline: on a busy machine a slow example says nothing.
quick = settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])

# What a secret may look like: no blank or quote, so that where it ends in a text is beyond doubt.
secrets = st.text("abcdefXYZ0123456789!$%*+,./;<>?@^_|~-[](){}=:#", min_size=6, max_size=20).map(
    lambda text: f"q7{text}7q"
)
safe_text = st.text(max_size=20)
names = st.sampled_from(SECRET_NAMES)
plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | safe_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(safe_text, inner, max_size=4),
    max_leaves=10,
)


def planted_in(value: Any, secret: str) -> bool:
    if isinstance(value, dict):
        return any(planted_in(key, secret) or planted_in(item, secret) for key, item in value.items())
    if isinstance(value, list | tuple):
        return any(planted_in(item, secret) for item in value)
    return isinstance(value, str) and secret in value


@quick
@given(secret=secrets, name=names, around=plain_values)
def test_a_secret_under_its_name_never_survives(secret, name, around):
    forms = [
        {name: secret},
        {name: [secret]},
        {name: {"x": secret}},
        (name, secret),
        ["cmd", f"--{name}", secret],
        {"name": name, "value": secret},
        {"note": f"{name}={json.dumps(secret)} {around}"},
        {"note": f"{around} {name}: {secret!r}"},
        {"note": json.dumps({"a": {name: secret, "around": str(around)}})},
    ]
    assert not planted_in(redact({"list": [around, *forms]}), secret)


@quick
@given(secret=secrets, left=safe_text, right=safe_text)
def test_a_secret_from_the_environment_never_survives(secret, left, right, monkeypatch):
    monkeypatch.setenv("SOME_API_TOKEN", secret)
    value = {"a": [left + secret + right, secret.encode()], left + secret: (secret, Path(secret))}
    assert secret not in repr(redact(value))
    assert secret not in redact_text(f"{left}{secret}{right}")


@quick
@given(
    scheme=st.sampled_from(["https", "postgresql+psycopg2", "s3", "redis"]),
    user=st.text("abcXYZ09._~-", max_size=8),
    secret=st.text("abcXYZ09!$&()*+,;=._~%-", min_size=6, max_size=30).map(lambda text: f"q7{text}7q"),
)
def test_a_secret_in_a_url_never_survives(scheme, user, secret):
    clean = redact_text(f"see {scheme}://{user}:{secret}@host:80/path?x=1 now")
    assert secret not in clean
    assert "@host:80/path?x=1 now" in clean


@quick
@given(plain_values)
def test_twice_is_once(value):
    once = redact(value)
    assert redact(once) == once


pieces = st.sampled_from(
    (
        *SECRET_NAMES,
        *(
            "=",
            ": ",
            '"',
            "'",
            "\\",
            "[",
            "]",
            "{",
            "}",
            "://",
            "@",
            "/",
            ":",
            "?",
            "&",
            " ",
            "\n",
            "--",
            "-",
            ",",
        ),
        *(
            "Bearer ",
            "Basic ",
            "Cookie: ",
            "x",
            "12",
            REMOVED,
            "removed]",
            "eyJabcdef.abcdefg",
            "sig=",
            "b'",
            "true",
        ),
        *("ghp_" + "a" * 20, "-----BEGIN PRIVATE KEY-----", "-----END PRIVATE KEY-----", "null"),
    )
)


@quick
@given(st.lists(pieces, max_size=14).map("".join))
def test_twice_is_once_for_texts_made_of_what_is_looked_for(text):
    once = redact_text(text)
    assert redact_text(once) == once
    assert redact({once: [text]}) == redact(redact({once: [text]}))


@quick
@given(st.dictionaries(safe_text.filter(lambda name: not is_strong_name(name)), st.integers() | st.floats()))
def test_numbers_are_unchanged(metrics):
    assert repr(redact(metrics)) == repr(metrics) or any(redact_text(key) != key for key in metrics)
