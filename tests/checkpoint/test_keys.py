from __future__ import annotations

import base64
import copy
import hashlib
import json
import os
import pickle
import secrets
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.keywrap import aes_key_unwrap

from ray_tracking.checkpoint import key_sources
from ray_tracking.checkpoint.keys import (
    DataKey,
    Key,
    Keyring,
    SealBrokenError,
    WrongKeyError,
    generate_key,
    key_of,
    no_key_error,
)
from ray_tracking.config.models import EncryptionConfig
from ray_tracking.errors import ConfigError, RefusedError, UsageError

RANDOM = hashlib.sha256(b"\xfb\xff").digest()
Source = Callable[[str], dict[str, str]]


@pytest.fixture
def key_file(tmp_path: Path) -> Source:
    """key_file(text): a section whose key file, that only its owner can open, holds the text."""

    def write(text: str) -> dict[str, str]:
        path = tmp_path / secrets.token_hex(4)
        path.touch(mode=0o600)
        path.write_text(text)
        return {"key_file": str(path)}

    return write


def keyring(section: Any) -> Keyring:
    ring = Keyring.from_config(section)
    assert ring is not None
    return ring


def python(code: str) -> dict[str, str]:
    return {"key_command": shlex.join([sys.executable, "-c", code])}


def refusal(section: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        Keyring.from_config(section)
    return str(caught.value)


def shown(error: BaseException) -> str:
    """Everything that a log, a report or a pickle could show of an error and of what led to it."""
    parts = ["".join(traceback.format_exception(error)), repr(pickle.dumps(error))]
    one: BaseException | None = error
    while one is not None:
        parts += [repr(one), repr(one.args), repr(vars(one))]
        one = one.__cause__ or one.__context__
    return "\n".join(parts)


def test_no_section_no_keyring() -> None:
    assert Keyring.from_config(None) is None


def test_a_generated_key_is_random_and_is_taken(key_file: Source) -> None:
    made = {generate_key() for _ in range(100)}
    assert len(made) == 100
    for text in made:
        assert len(base64.b64decode(text, validate=True)) == 32
    assert keyring(key_file(made.pop())).can_seal


@pytest.mark.parametrize(
    "write",
    [
        lambda secret: secret.hex(),
        lambda secret: secret.hex().upper(),
        lambda secret: base64.b64encode(secret).decode(),
        lambda secret: base64.b64encode(secret).decode().rstrip("="),
        lambda secret: base64.urlsafe_b64encode(secret).decode(),
        lambda secret: f"# of the cluster\r\n\r\n  {secret.hex()}  \r\n# until May\r\n",
    ],
    ids=["hex", "HEX", "base64", "unpadded", "urlsafe", "comments"],
)
def test_every_form_of_a_key_is_the_same_key(write: Callable[[bytes], str], key_file: Source) -> None:
    assert keyring(key_file(write(RANDOM))).ids == (Key(RANDOM).id,)


def test_an_id_is_of_the_secret_and_tells_nothing_of_it() -> None:
    secret = bytes(range(32))
    assert Key(secret).id == hashlib.sha256(b"ray-tracking checkpoint key id v1\0" + secret).hexdigest()[:16]
    assert Key(secret).id == "f1c6354924d1933a"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "gives nothing"),
        ("# only a comment\n", "gives nothing"),
        (f"{RANDOM.hex()}\n{RANDOM.hex()}\n", "gives 2 lines"),
        (base64.b64encode(RANDOM[:16]).decode(), "gives 24 characters"),
        (RANDOM[:31].hex(), "gives 62 characters"),
        (RANDOM.hex()[:-1] + "g", "gives 64 characters"),
        ("correct horse battery staple", "gives 28 characters"),
        ("\N{SNOWMAN}" * 44, "gives 132 characters"),
        ("00" * 32, "weak key: it repeats itself"),
        (RANDOM[:16].hex() * 2, "weak key: it repeats itself"),
        (bytes(range(32)).hex(), "weak key: it counts"),
        (bytes(range(255, 159, -3)).hex(), "weak key: it counts"),
        ((b"\x00" * 31 + b"\x01").hex(), "weak key: too few"),
        (b"correct horse battery staple abc".hex(), "weak key: it is text"),
    ],
)
def test_what_is_no_key_is_refused(text: str, why: str, key_file: Source) -> None:
    section = key_file(text)
    with pytest.raises(ConfigError) as caught:
        Keyring.from_config(section)
    message = str(caught.value)
    assert message.startswith("training.default.encryption.key_file gives ")
    assert why in message
    assert "32 random bytes as base64 or hex on one line" in message
    assert message.splitlines()[-1].startswith("Make one with: ")
    for line in text.split("\n"):
        assert len(line) < 8 or line not in shown(caught.value)


def test_how_to_make_a_key_makes_one(tmp_path: Path) -> None:
    program = f"{sys.executable} -m ray_tracking"
    command = key_sources._HOW_TO_MAKE.removeprefix("Make one with: ").replace("ray-tracking", program, 1)
    assert os.waitstatus_to_exitcode(os.system(f"cd {tmp_path} && {command}")) == 0
    assert (tmp_path / "checkpoint.key").stat().st_mode & 0o777 == 0o600
    assert keyring({"key_file": str(tmp_path / "checkpoint.key")}).can_seal


def test_a_key_file_is_for_its_owner_and_written_once(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.key"
    key = key_of(text := generate_key())
    before = os.umask(0)
    try:
        key_sources.write_key_file(path, text, key.id)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert keyring({"key_file": str(path)}).ids == (key.id,)
    for name in (path, tmp_path / "link"):
        if name != path:
            name.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(RefusedError, match="is there already"):
            key_sources.write_key_file(name, generate_key(), "0" * 16)
    assert keyring({"key_file": str(path)}).ids == (key.id,)
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(UsageError, match="No key file can be made"):
        key_sources.write_key_file(tmp_path / "no" / "folder", text, key.id)


def test_a_key_file_that_can_not_be_written_is_not_left_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(UsageError, match="No space left"):
        key_sources.write_key_file(tmp_path / "checkpoint.key", generate_key(), "0" * 16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("section", "found"),
    [
        ({}, "encryption names no key"),
        ({"key_file": None, "recipients": [], "old_keys": ()}, "encryption names no key"),
        ({"key_file": "a", "key_env": "B"}, "encryption names key_file and key_env"),
        ({"key_env": "HOME_KEY", "recipients": [{}]}, "encryption.recipients[0] names no key"),
        (
            {"old_keys": [{"key_env": "NO_SUCH_KEY"}]},
            "encryption.old_keys[0].key_env: the environment variable NO_SUCH",
        ),
    ],
)
def test_a_section_that_names_no_key(section: dict[str, Any], found: str) -> None:
    assert f"training.default.{found}" in refusal(section)


def test_a_key_from_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHECKPOINT_KEY", "5f" * 16 + "a0" * 16)
    assert "weak key" in refusal({"key_env": "CHECKPOINT_KEY"})
    text = generate_key()
    monkeypatch.setenv("CHECKPOINT_KEY", text)
    section = EncryptionConfig(key_env="CHECKPOINT_KEY")
    assert keyring(section).ids == (Key(base64.b64decode(text)).id,)


def test_a_key_file_that_is_not_there(tmp_path: Path) -> None:
    message = refusal({"key_file": str(tmp_path / "no.key")})
    assert f"key_file: the key file {tmp_path}/no.key can't be read here: No such file or directory." in message
    assert "Is a directory" in refusal({"key_file": str(tmp_path)})


def test_a_key_file_that_others_can_open_is_warned_of(key_file: Source, capsys: pytest.CaptureFixture[str]) -> None:
    text = generate_key()
    section = key_file(text)
    keyring(section)
    assert capsys.readouterr().err == ""
    os.chmod(section["key_file"], 0o640)
    keyring(section)
    log = capsys.readouterr().err
    assert "others than its owner can open the key file" in log
    assert f"chmod 600 {section['key_file']}" in log
    assert text not in log


class TestCommand:
    def test_its_output_is_the_key(self) -> None:
        text = generate_key()
        section = python(f"import sys; print('asking the KMS', file=sys.stderr); print('# v3'); print('{text}')")
        assert keyring(section).ids == (Key(base64.b64decode(text)).id,)

    def test_it_is_run_without_a_shell(self, tmp_path: Path) -> None:
        assert "gives" in refusal({"key_command": f"echo $(touch {tmp_path}/made) ; touch {tmp_path}/made"})
        assert not (tmp_path / "made").exists()

    def test_its_failure_is_shown_but_not_what_it_prints(self) -> None:
        text = generate_key()
        code = f"import sys; print('{text}'); print('no access for {text}', file=sys.stderr); sys.exit(3)"
        with pytest.raises(ConfigError) as caught:
            Keyring.from_config(python(code))
        message = str(caught.value)
        assert f"encryption.key_command: {sys.executable} ended with exit status 3. It says:" in message
        assert "no access for [removed]" in message
        assert text not in shown(caught.value)

    def test_a_signal_is_named(self) -> None:
        assert "was ended by signal 9." in refusal(python("import os; os.kill(os.getpid(), 9)"))

    def test_garbage_is_refused_and_not_shown(self) -> None:
        with pytest.raises(ConfigError) as caught:
            Keyring.from_config(python("import sys; sys.stdout.buffer.write(b'\\xff\\xfe planted-garbage' * 9)"))
        assert "key_command gives 162 characters that are not" in str(caught.value)
        assert "planted-garbage\N{REPLACEMENT CHARACTER}" not in shown(caught.value)

    @pytest.mark.parametrize("then", ["sleep 60; true", "exec >&- 2>&-; sleep 60; true"])
    def test_a_time_out_ends_it_and_what_it_started(self, then: str, monkeypatch: pytest.MonkeyPatch) -> None:
        started: list[int] = []

        class Noted(subprocess.Popen):
            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, **options)
                started.append(self.pid)

        monkeypatch.setattr(key_sources, "COMMAND_SECONDS", 1)
        monkeypatch.setattr(subprocess, "Popen", Noted)
        command = shlex.join(["sh", "-c", then])
        deadline = time.monotonic() + 30
        assert "key_command: sh did not end within 1 seconds." in refusal({"key_command": command})
        assert time.monotonic() < deadline, "it was left to end by itself"
        (group,) = started
        while any(_is_running_in_group(entry, group) for entry in os.listdir("/proc") if entry.isdigit()):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def test_what_it_leaves_in_the_background_is_not_waited_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(key_sources, "COMMAND_SECONDS", 60)
        command = shlex.join(["sh", "-c", f"sleep 300 & echo $! > {tmp_path}/pid; echo {generate_key()}"])
        try:
            assert keyring({"key_command": command}).can_seal
        finally:
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)

    def test_a_flood_is_cut(self) -> None:
        assert "prints more than 65536 bytes" in refusal({"key_command": "yes"})

    @pytest.mark.parametrize(
        ("command", "why"),
        [
            ("no-such-program --token planted", "no-such-program can't be started here: No such file"),
            ("kms 'get", "the command can't be split into words: No closing quotation"),
            ("  ", "the command is empty"),
        ],
    )
    def test_what_can_not_be_started(self, command: str, why: str) -> None:
        message = refusal({"key_command": command})
        assert f"training.default.encryption.key_command: {why}" in message
        assert "planted" not in message


def _is_running_in_group(pid: str, group: int) -> bool:
    try:
        fields = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return int(fields[2]) == group and fields[0] != "Z"


def test_a_data_key_is_wrapped_for_the_sealing_key_and_all_recipients(key_file: Source) -> None:
    mine, theirs, old = generate_key(), generate_key(), generate_key()
    ring = keyring({**key_file(mine), "recipients": [key_file(theirs), key_file(mine)], "old_keys": [key_file(old)]})
    data_key = ring.new_data_key()
    manifest = json.loads(json.dumps(data_key.wrapped))
    assert [entry["id"] for entry in manifest] == [Key(base64.b64decode(text)).id for text in (mine, theirs)]
    for text in (mine, theirs):
        assert keyring(key_file(text)).open(manifest).secret == data_key.secret
        assert keyring({"old_keys": [key_file(text)]}).open(manifest).secret == data_key.secret
        assert keyring({"recipients": [key_file(text)]}).open(manifest).wrapped == data_key.wrapped
    with pytest.raises(WrongKeyError):
        keyring(key_file(old)).open(manifest)


def test_the_wrapping_is_what_the_docs_say(key_file: Source) -> None:
    secret = secrets.token_bytes(32)
    data_key = keyring(key_file(secret.hex())).new_data_key()
    wrapping_key = HKDF(SHA256(), 32, None, b"ray-tracking checkpoint key wrap v1").derive(secret)
    assert aes_key_unwrap(wrapping_key, base64.b64decode(data_key.wrapped[0]["wrapped"])) == data_key.secret


def test_each_save_has_a_data_key_of_its_own(key_file: Source) -> None:
    ring = keyring(key_file(generate_key()))
    made = [ring.new_data_key() for _ in range(50)]
    assert len({data_key.secret for data_key in made}) == 50
    assert len({data_key.wrapped[0]["wrapped"] for data_key in made}) == 50


def test_rotation(key_file: Source) -> None:
    first, second = key_file(generate_key()), key_file(generate_key())
    old = keyring(first).new_data_key()
    rotated = keyring({**second, "old_keys": [first]})
    assert rotated.open(old.wrapped).secret == old.secret
    new = rotated.new_data_key()
    assert rotated.open(new.wrapped).secret == new.secret
    assert [entry["id"] for entry in new.wrapped] == list(keyring(second).ids)
    with pytest.raises(WrongKeyError):
        keyring(first).open(new.wrapped)


def test_old_keys_alone_open_and_do_not_seal(key_file: Source) -> None:
    section = key_file(generate_key())
    data_key = keyring(section).new_data_key()
    ring = keyring({"old_keys": [section]})
    assert ring.open(data_key.wrapped).secret == data_key.secret
    assert not ring.can_seal
    with pytest.raises(ConfigError, match=r"but none that seals new ones\.\nSet one of key_file, key_env, key_command"):
        ring.new_data_key()


def test_a_wrong_key_is_named(key_file: Source) -> None:
    ring = keyring({**key_file(generate_key()), "old_keys": [key_file(generate_key())]})
    other = keyring({**key_file(generate_key()), "recipients": [key_file(generate_key())]})
    with pytest.raises(WrongKeyError) as caught:
        ring.open(other.new_data_key().wrapped)
    error = caught.value
    assert isinstance(error, RefusedError)
    assert error.exit_code == 3
    for key_id in (*ring.ids, *other.ids):
        assert key_id in str(error)
    assert str(error).splitlines()[-1].startswith("Set training.default.encryption.old_keys (or key_file,")


def test_no_key_at_all_is_said() -> None:
    data_key = Keyring(Key(secrets.token_bytes(32))).new_data_key()
    error = no_key_error(data_key.wrapped)
    assert isinstance(error, WrongKeyError)
    assert str(error) == (
        f"It is encrypted for key {data_key.wrapped[0]['id']}, and training.default.encryption is not set.\n"
        "Set training.default.encryption.key_file, key_env or key_command to where one of its keys is."
    )


@pytest.mark.parametrize("position", range(40))
def test_an_altered_wrapping_is_refused(position: int) -> None:
    ring = Keyring(Key(secrets.token_bytes(32)))
    [entry] = ring.new_data_key().wrapped
    altered = bytearray(base64.b64decode(entry["wrapped"]))
    altered[position] ^= 1
    with pytest.raises(SealBrokenError, match="wrapped data key in the manifest was altered"):
        ring.open([{**entry, "wrapped": base64.b64encode(altered).decode()}])


@pytest.mark.parametrize("wrapped", ["", "!", None, 7, "AAAA", base64.b64encode(bytes(24)).decode(), "\ud800"])
def test_a_wrapping_of_another_shape_is_refused(wrapped: Any) -> None:
    ring = Keyring(Key(secrets.token_bytes(32)))
    with pytest.raises(SealBrokenError):
        ring.open([{"id": ring.ids[0], "wrapped": wrapped}])


@pytest.mark.parametrize("wrapped", [[], None, {}, "text", [None, 7], [{"id": "\x1b[31m", "wrapped": "AAAA"}]])
def test_entries_that_name_no_key_are_a_wrong_key(wrapped: Any) -> None:
    for error in (no_key_error(wrapped), _wrong_key(wrapped)):
        assert "encrypted for no key that can be named" in str(error)
        assert "\x1b" not in str(error)


def _wrong_key(wrapped: Any) -> WrongKeyError:
    with pytest.raises(WrongKeyError) as caught:
        Keyring(Key(secrets.token_bytes(32))).open(wrapped)
    return caught.value


def test_another_recipients_altered_entry_does_no_harm() -> None:
    mine = Key(secrets.token_bytes(32))
    data_key = Keyring(Key(secrets.token_bytes(32)), [mine]).new_data_key()
    broken = [{**data_key.wrapped[0], "wrapped": "?"}, data_key.wrapped[1]]
    assert Keyring(mine).open(broken).secret == data_key.secret


def test_the_manifest_mac() -> None:
    data_key, other = DataKey(secrets.token_bytes(32)), DataKey(secrets.token_bytes(32))
    mac = data_key.mac(b"body")
    assert DataKey(data_key.secret).has_mac(b"body", mac)
    assert not data_key.has_mac(b"bodY", mac)
    assert not other.has_mac(b"body", mac)
    for claimed in (None, "", mac[:-1], mac.upper(), 7, "\ud800"):
        assert not data_key.has_mac(b"body", claimed)


def test_a_file_key_is_of_salt_and_context() -> None:
    data_key = DataKey(bytes(32))
    keys = {data_key.file_key(bytes(32), b"a"), data_key.file_key(b"\1" * 32, b"a"), data_key.file_key(bytes(32), b"b")}
    assert len(keys) == 3
    assert data_key.secret not in keys


@pytest.mark.parametrize("kind", [Key, DataKey])
def test_a_secret_does_not_show(kind: type[Key] | type[DataKey]) -> None:
    secret = secrets.token_bytes(32)
    key = kind(secret)
    texts = repr(key), str(key), f"{key}", repr([key]), repr({"key": key})
    for form in (secret.hex(), base64.b64encode(secret).decode(), repr(secret)[2:-1], str(list(secret))):
        assert all(form not in text for text in texts)
    for take in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="is secret: it can't be pickled or copied") as caught:
            take(key)  # type: ignore[operator]
        assert secret.hex() not in str(caught.value)
    with pytest.raises(ValueError, match="a key has 32 bytes, not 31"):
        kind(secret[:31])


def test_a_keyring_does_not_show_its_keys() -> None:
    secret = secrets.token_bytes(32)
    ring = Keyring(Key(secret))
    assert repr(ring) == f"Keyring({Key(secret).id})"
    with pytest.raises(TypeError, match="is secret"):
        pickle.dumps(ring)
