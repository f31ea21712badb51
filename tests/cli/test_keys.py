from __future__ import annotations

import json
from pathlib import Path

import pytest

from ray_tracking.checkpoint.key_sources import KEY_BYTES
from ray_tracking.checkpoint.keys import Keyring, generate_key, key_of
from tests.cli.conftest import Cli


def test_a_new_key_in_a_file(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.key"
    done = cli("checkpoints", "key", "new", "-o", str(path))
    assert (done.code, done.err) == (0, "")
    assert path.stat().st_mode & 0o777 == 0o600
    (secret,) = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert secret not in done.out
    assert key_of(secret).id in done.out
    assert f"--set training.default.encryption.key_file={path}" in done.out
    before = path.read_bytes()
    done = cli("checkpoints", "key", "new", "-o", str(path))
    assert done.code == 3
    assert "is there already" in done.err
    assert path.read_bytes() == before


def test_a_new_key_on_standard_output(cli: Cli) -> None:
    first, second = (cli("checkpoints", "key", "new") for _ in range(2))
    assert first.out != second.out
    assert first.err == f"This is key {key_of(first.out.strip()).id}.\n"


def test_the_id_of_a_key(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = generate_key()
    path = tmp_path / "checkpoint.key"
    path.write_text(text)
    path.chmod(0o600)
    monkeypatch.setenv("OUR_KEY", text)
    for source in (["--key-file", str(path)], ["--key-env", "OUR_KEY"], ["--key-command", f"cat {path}"]):
        done = cli("checkpoints", "key", "id", *source)
        assert (done.code, done.out, done.err) == (0, f"{key_of(text).id}\n", "")


def test_the_ids_of_a_config(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"NOW": generate_key(), "BEFORE": generate_key()}
    for name, text in texts.items():
        monkeypatch.setenv(name, text)
    config = tmp_path / "config.yaml"
    encryption = {"key_env": "NOW", "old_keys": [{"key_env": "BEFORE"}]}
    config.write_text(json.dumps({"training": {"default": {"encryption": encryption}}}))
    ids = [key_of(text).id for text in texts.values()]
    assert cli("checkpoints", "key", "id", "-c", str(config)).out.split() == ids
    assert json.loads(cli("checkpoints", "key", "id", "-c", str(config), "--json").out) == ids
    ring = Keyring.from_config(encryption)
    assert ring is not None
    assert list(ring.ids) == ids


def test_what_is_no_key(cli: Cli, tmp_path: Path) -> None:
    done = cli("checkpoints", "key", "id")
    assert done.code == 2
    assert "--key-file, --key-env or --key-command" in done.err
    (tmp_path / "two").write_text(generate_key()[: KEY_BYTES // 2])
    (tmp_path / "two").chmod(0o600)
    done = cli("checkpoints", "key", "id", "--key-file", str(tmp_path / "two"))
    assert done.code == 2
    assert "gives 16 characters" in done.err
    done = cli("checkpoints", "key", "id", "--key-env", "A", "--key-command", "b")
    assert done.code == 2
    assert "key_env and key_command" in done.err
