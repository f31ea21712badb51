"""Storage on a local directory and on S3: whole or absent, and failures that say what to do."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import subprocess
import time
from pathlib import Path

import pytest

from ray_tracking.errors import NameRefusedError, StorageError
from ray_tracking.storage import Storage, check_name, without_credentials
from ray_tracking.writing import RemoteWriting
from tests.s3 import s3_server, s3_uri

__all__ = ["s3_server", "s3_uri"]


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage.open(tmp_path / "store")
    return Storage.open(request.getfixturevalue("s3_uri"))


@pytest.fixture
def tmpfs(tmp_path: Path):
    """A file system of 1 MiB, or a skip where it can't be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs can't be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_what_is_written_is_read_listed_and_deleted(storage, tmp_path):
    assert storage.list() == []
    assert list(storage.walk()) == []
    storage.write_bytes("r1/a.bin", b"one")
    storage.write_bytes("r1/deep/er/b.bin", memoryview(b"three"))
    storage.write_bytes("r1/a.bin", b"two!")
    source = tmp_path / "source"
    source.write_bytes(os.urandom(1 << 20))
    storage.child("r1").upload(source, "c.bin", chunk=1 << 18)

    assert storage.read_bytes("r1/a.bin") == b"two!"
    assert storage.read_bytes("r1/c.bin") == source.read_bytes()
    with storage.open_input("r1/c.bin") as stream:
        stream.seek(1000)
        assert stream.read(5) == source.read_bytes()[1000:1005]
    assert [(e.name, e.size, e.is_dir) for e in storage.list("r1")] == [
        ("a.bin", 4, False),
        ("c.bin", 1 << 20, False),
        ("deep", 0, True),
    ]
    assert list(storage.walk()) == [("r1/a.bin", 4), ("r1/c.bin", 1 << 20), ("r1/deep/er/b.bin", 5)]
    assert list(storage.child("r1").walk("deep")) == [("deep/er/b.bin", 5)]

    storage.delete("r1/a.bin")
    storage.delete("r1/a.bin")
    assert not storage.exists("r1/a.bin")
    assert storage.exists("r1/deep/er/b.bin")
    storage.delete_dir("r1/deep")
    storage.delete_dir("r1/deep")
    assert [e.name for e in storage.list("r1")] == ["c.bin"]
    storage.delete_dir("r1")
    assert storage.list() == []


def test_what_is_not_there(storage):
    for read in (storage.read_bytes, storage.open_input):
        with pytest.raises(FileNotFoundError):
            read("no/such/file")
    assert storage.list("no/such/folder") == []
    assert not storage.exists("no")


def test_it_probes_pickles_and_has_children(storage):
    storage.probe()
    assert list(storage.walk()) == []
    copy = pickle.loads(pickle.dumps(storage.child("r1", "deep")))  # noqa: S301
    copy.write_bytes("x", b"1")
    assert list(storage.walk()) == [("r1/deep/x", 1)]


def test_the_root_itself_is_never_deleted_or_written(storage):
    storage.write_bytes("x", b"1")
    for act in (storage.delete, storage.delete_dir, lambda name: storage.write_bytes(name, b"")):
        with pytest.raises(NameRefusedError):
            act("")
    assert storage.read_bytes("x") == b"1"


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a/../b", "/etc", "a//b", "%2e%2e", "C:\\x", "a\\b", "a\n", "a\0", "ü", ".hidden", "x" * 201],
)
def test_names_that_could_leave_the_folder_are_refused_before_any_work(tmp_path, name):
    with pytest.raises(NameRefusedError):
        Storage.open(tmp_path).write_bytes(name, b"")
    assert list(tmp_path.iterdir()) == []
    if "/" not in name:
        with pytest.raises(NameRefusedError, match="run id"):
            check_name(name, "run id")


# --- local


def refused(storage: Storage) -> str:
    with pytest.raises(StorageError) as caught:
        storage.probe()
    assert caught.value.hint
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_path_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused(Storage.open(tmp_path / "file"))
    assert "Not a directory" in refused(Storage.open(tmp_path / "file" / "below"))
    with pytest.raises(StorageError, match="Not a directory"):
        Storage.open(tmp_path / "file").list()


def test_a_folder_that_can_not_be_written():
    assert "/proc/" in refused(Storage.open("/proc/ray-tracking"))


def test_a_full_disk_leaves_the_old_file_and_no_rest(tmpfs, tmp_path):
    storage = Storage.open(tmpfs)
    storage.write_bytes("a", b"old")
    with pytest.raises(StorageError, match="No space left"):
        storage.write_bytes("a", bytes(2 << 20))
    source = tmp_path / "big"
    source.write_bytes(bytes(2 << 20))
    with pytest.raises(StorageError, match="No space left"):
        storage.upload(source, "b")
    assert storage.read_bytes("a") == b"old"
    assert os.listdir(tmpfs) == ["a"]
    storage.write_bytes("a", b"new")
    assert storage.read_bytes("a") == b"new"


def test_a_read_only_file_system(tmpfs):
    storage = Storage.open(tmpfs)
    storage.write_bytes("a", b"old")
    subprocess.run(["mount", "-o", "remount,ro", str(tmpfs)], check=True)
    assert "Read-only" in refused(storage)
    assert storage.read_bytes("a") == b"old"


def test_a_write_is_durable_before_it_returns_with_every_folder_it_made(tmp_path, monkeypatch):
    synced = []
    real = os.fsync

    def watch(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    Storage.open(tmp_path).write_bytes("r/j/a", b"1")
    assert synced[:2] == [tmp_path, tmp_path / "r"]
    assert synced[2].name.startswith(".tmp-")
    assert synced[3:] == [tmp_path / "r" / "j"]


def test_unfinished_writes_are_not_shown(tmp_path):
    storage = Storage.open(tmp_path)
    storage.write_bytes("a", b"")
    (tmp_path / ".tmp-0123").write_bytes(b"half")
    assert [entry.name for entry in storage.list()] == ["a"]
    assert list(storage.walk()) == [("a", 0)]


def test_relative_home_and_file_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Storage.open("runs").root == str(tmp_path / "runs")
    assert Storage.open("~/runs").root == str(tmp_path / "home" / "runs")
    assert Storage.open("file:///tmp/runs").root == "/tmp/runs"


# --- S3


def elapsed_refusal(uri: str) -> tuple[float, str]:
    started = time.monotonic()
    with pytest.raises(StorageError) as caught:
        Storage.open(uri)
    return time.monotonic() - started, str(caught.value)


def test_a_bad_key_is_refused_at_once(s3_server, s3_uri, monkeypatch):
    if s3_server.kind == "moto":
        pytest.skip("moto accepts any key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    seconds, message = elapsed_refusal(s3_uri)
    assert "AWS_SECRET_ACCESS_KEY" in message
    assert seconds < 5


def test_no_credentials_are_refused_at_once(s3_server, s3_uri, monkeypatch, tmp_path):
    if s3_server.kind == "moto":
        pytest.skip("moto accepts any key")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    seconds, message = elapsed_refusal(s3_uri)
    assert "AWS_ACCESS_KEY_ID" in message
    assert seconds < 10


def test_a_bucket_that_is_not_there_is_named(s3_server, s3_uri):
    seconds, message = elapsed_refusal(s3_server.uri("runs", bucket="no-such-bucket"))
    assert "no bucket 'no-such-bucket'" in message
    assert seconds < 5


def test_nothing_listens(monkeypatch):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    seconds, message = elapsed_refusal(f"s3://key:hidden@bucket/runs?endpoint_override=127.0.0.1:{port}&scheme=http")
    assert "does not answer" in message
    assert "hidden" not in message
    assert seconds < 10


def test_a_server_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:
        port = silent.getsockname()[1]
        uri = f"s3://key:hidden@bucket/runs?endpoint_override=127.0.0.1:{port}&scheme=http"
        seconds, message = elapsed_refusal(uri)
    assert "does not answer" in message
    assert seconds < 12


def test_an_unknown_option_names_the_allowed_ones():
    with pytest.raises(StorageError, match=r"'endpoint' is not known; allowed: .*endpoint_override"):
        Storage.open("s3://bucket/runs?endpoint=127.0.0.1:1")
    with pytest.raises(StorageError, match="no bucket"):
        Storage.open("s3:///runs")


def test_a_small_object_is_one_put_and_an_upload_that_breaks_is_taken_away(s3_server, s3_uri, tmp_path, monkeypatch):
    storage = Storage.open(s3_uri)
    storage.write_bytes("small", b"1")
    bucket, _, key = storage.path("small").partition("/")
    assert "-" not in s3_server.client().head_object(Bucket=bucket, Key=key)["ETag"]  # "...-1" is a multipart upload

    def half(self, block):
        if self.written:
            raise OSError(5, "Input/output error")
        self.written = True
        original(self, block)

    original = RemoteWriting._write
    monkeypatch.setattr(RemoteWriting, "written", False, raising=False)
    monkeypatch.setattr(RemoteWriting, "_write", half)
    source = tmp_path / "source"
    source.write_bytes(bytes(1 << 20))
    with pytest.raises(StorageError, match="Input/output error"):
        storage.upload(source, "half", chunk=1 << 18)
    assert [name for name, _ in storage.walk()] == ["small"]


def test_the_user_part_of_a_uri_is_not_shown():
    assert without_credentials("s3://key:secret@bucket/a?b=c") == "s3://bucket/a?b=c"
    assert without_credentials("/a@b/c") == "/a@b/c"
