"""Storage on a local directory and on S3: whole or absent, and failures that say what to do."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import ClientError, ConnectionClosedError

from ray_tracking import conditional
from ray_tracking.errors import NameRefusedError, StorageError
from ray_tracking.s3 import S3Options
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


def test_a_new_file_is_made_once(storage):
    assert storage.create_new("r/lease", b"one") is True
    assert storage.create_new("r/lease", b"two") is False
    assert storage.create_new("r/lease", b"one") is True  # the same bytes: it was this caller, its reply was lost
    assert storage.read_bytes("r/lease") == b"one"
    assert [entry.name for entry in storage.list("r")] == ["lease"]
    with pytest.raises(NameRefusedError):
        storage.create_new("../lease", b"one")


def test_of_many_at_once_one_makes_it(storage):
    for number in range(20 if storage.is_local else 2):
        start = threading.Barrier(6)

        def make(who: int, name: str, start: threading.Barrier = start) -> bool:
            start.wait()
            return storage.create_new(name, b"%d" % who)

        with ThreadPoolExecutor(6) as pool:
            made = list(pool.map(make, range(6), [f"f{number}"] * 6))
        assert made.count(True) == 1
        assert storage.read_bytes(f"f{number}") == b"%d" % made.index(True)


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


def test_a_new_file_is_whole_and_durable_with_its_folder(tmp_path, monkeypatch):
    synced = []
    real = os.fsync

    def watch(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    assert Storage.open(tmp_path).create_new("r/a", b"1")
    assert synced[0] == tmp_path
    assert synced[1].name.startswith(".tmp-")
    assert synced[2:] == [tmp_path / "r"]
    assert os.listdir(tmp_path / "r") == ["a"]


def test_a_new_file_whose_link_was_made_though_it_failed_is_ours(tmp_path, monkeypatch):
    """As over NFS, when the server's reply is lost and the request repeated."""
    real = os.link
    monkeypatch.setattr(os, "link", lambda source, target: (real(source, target), real(source, target)))
    storage = Storage.open(tmp_path)
    assert storage.create_new("a", b"1")
    assert not storage.create_new("a", b"2")
    assert os.listdir(tmp_path) == ["a"]


def test_a_new_file_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    storage = Storage.open(tmp_path)
    assert storage.create_new("a", b"1")
    assert not storage.create_new("a", b"2")
    assert storage.read_bytes("a") == b"1"
    assert os.listdir(tmp_path) == ["a"]


def test_no_new_file_on_a_full_disk(tmpfs):
    storage = Storage.open(tmpfs)
    with pytest.raises(StorageError, match="No space left"):
        storage.create_new("a", bytes(2 << 20))
    assert os.listdir(tmpfs) == []
    (tmpfs / "file").touch()
    with pytest.raises(StorageError, match="Not a directory"):
        storage.create_new("file/a", b"")


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
        closed.bind(("127.0.0.1", 0))  # while it is held, nobody else can listen there
        port = closed.getsockname()[1]
        uri = f"s3://key:hidden@bucket/runs?endpoint_override=127.0.0.1:{port}&scheme=http"
        seconds, message = elapsed_refusal(uri)
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


class Flaky:
    """boto3's client, whose first `faults` puts go wrong as `fault` says: after it was made, or without."""

    def __init__(self, real: Any, fault: Exception, faults: int, *, made: bool) -> None:
        self.real, self.fault, self.faults, self.made = real, fault, faults, made
        self.calls = 0

    def put_object(self, **arguments: Any) -> Any:
        self.calls += 1
        if self.calls > self.faults:
            return self.real.put_object(**arguments)
        if self.made:
            self.real.put_object(**arguments)
        raise self.fault


@pytest.mark.parametrize("kind", ["connection", "precondition"])
def test_a_new_object_whose_reply_was_lost_is_ours(s3_uri, monkeypatch, kind):
    """boto3 repeats the request by itself: then S3 says that there is one already."""
    storage = Storage.open(s3_uri)
    lost = {
        "connection": ConnectionClosedError(endpoint_url="http://s3"),
        "precondition": ClientError({"Error": {"Code": "PreconditionFailed"}}, "PutObject"),
    }[kind]
    real = conditional._client
    monkeypatch.setattr(conditional, "_client", lambda options: Flaky(real(options), lost, 1, made=True))
    assert storage.create_new("a", b"mine")
    assert not storage.create_new("a", b"other")
    assert storage.read_bytes("a") == b"mine"


def test_a_new_object_that_failed_is_said_and_one_in_conflict_is_tried_again(s3_uri, monkeypatch):
    storage = Storage.open(s3_uri)
    real = conditional._client
    closed = ConnectionClosedError(endpoint_url="http://s3")
    monkeypatch.setattr(conditional, "_client", lambda options: Flaky(real(options), closed, 1, made=False))
    with pytest.raises(StorageError, match=r"Can't create .*Connection was closed"):
        storage.create_new("a", b"mine")
    conflict = ClientError({"Error": {"Code": "ConditionalRequestConflict"}}, "PutObject")
    flaky = Flaky(real(S3Options.parse(s3_uri)), conflict, 2, made=False)
    monkeypatch.setattr(conditional, "_client", lambda options: flaky)
    assert storage.create_new("a", b"mine")
    assert flaky.calls == 3


def test_a_new_object_with_a_bad_key_is_refused(s3_server, s3_uri, monkeypatch):
    if s3_server.kind == "moto":
        pytest.skip("moto accepts any key")
    storage = Storage.open(s3_uri)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match="AWS_SECRET_ACCESS_KEY"):
        storage.create_new("a", b"mine")
    monkeypatch.undo()
    assert s3_server.keys(storage.path("a").partition("/")[2]) == []


def test_a_new_object_with_the_key_of_the_uri(s3_server, s3_uri, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    storage = Storage.open(s3_uri.replace("s3://", "s3://testkey:testsecret@"))
    assert storage.child("r").create_new("a", b"mine")
    assert storage.read_bytes("r/a") == b"mine"


def test_a_new_object_without_boto3_is_the_last_one_written(s3_uri, monkeypatch):
    storage = Storage.open(s3_uri)
    assert conditional.is_exclusive(storage)
    monkeypatch.setattr(conditional, "find_spec", lambda name: None)
    assert not conditional.is_exclusive(storage)
    monkeypatch.setattr(conditional, "SETTLE_SECONDS", 0.0)
    assert storage.create_new("a", b"mine")
    assert not storage.create_new("a", b"other")
    rival = storage.child("r")
    monkeypatch.setattr(conditional, "time", SimpleNamespace(sleep=lambda seconds: rival.write_bytes("a", b"rival")))
    assert not storage.create_new("r/a", b"mine")


def test_the_user_part_of_a_uri_is_not_shown():
    assert without_credentials("s3://key:secret@bucket/a?b=c") == "s3://bucket/a?b=c"
    assert without_credentials("/a@b/c") == "/a@b/c"
