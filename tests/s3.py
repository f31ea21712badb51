"""A real S3 server for tests, on loopback: Ceph's RADOS Gateway if it is installed, else moto's, else a skip.

In: nothing. Out: the fixtures `s3_server` (one per session) and `s3_uri` (a fresh folder, the credentials in
the environment). Import both where they are needed; the server starts once all the same.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

CEPH = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
_BUCKET = "ray-tracking-tests"


@dataclass(frozen=True)
class S3Server:
    """`kind` is "radosgw" or "moto" (which accepts any key), `endpoint` host:port."""

    kind: str
    endpoint: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": "testkey",
            "AWS_SECRET_ACCESS_KEY": "testsecret",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def uri(self, path: str, bucket: str = _BUCKET) -> str:
        return f"s3://{bucket}/{path}?endpoint_override={self.endpoint}&scheme=http"

    def client(self):
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=f"http://{self.endpoint}",
            region_name="us-east-1",
            aws_access_key_id="testkey",
            aws_secret_access_key="testsecret",
        )

    def keys(self, prefix: str = "", bucket: str = _BUCKET) -> list[str]:
        """The objects as the server names them, by another client than the one under test."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]


said: list[str] = []
"""Which server ran in this process, or why none did: for the end of pytest's output."""


@pytest.fixture(scope="session")
def s3_server() -> S3Server:
    server = _start()
    if isinstance(server, str):
        pytest.skip(server)
    return server


@pytest.fixture
def s3_uri(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of a folder that is not there yet, in a bucket that is."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server.uri(f"test-{secrets.token_hex(4)}")


@functools.cache
def _start() -> S3Server | str:
    """A server that answers and has the bucket, or the reason why there is none."""
    try:
        import boto3  # noqa: F401
    except ImportError:
        return _say("no S3 server: boto3 is not installed (pip install 'ray-tracking[dev]')")
    missing = [name for name in CEPH if shutil.which(name) is None]
    reason = f"not installed: {', '.join(missing)}"
    if not missing:
        try:
            return _ready(_start_radosgw())
        except (OSError, subprocess.SubprocessError, TimeoutError) as error:
            reason = f"did not start: {error}"
    try:
        import moto.server  # noqa: F401
    except ImportError:
        return _say(f"no S3 server: radosgw {reason}; moto[server] not installed")
    _say(f"radosgw {reason}")
    return _ready(_start_moto())


def _ready(server: S3Server) -> S3Server:
    server.client().create_bucket(Bucket=_BUCKET)
    _say(f"S3 server for the tests: {server.kind} on {server.endpoint}")
    return server


def _say(text: str) -> str:
    said.append(text)
    return text


def _start_moto() -> S3Server:
    port = _free_port()
    _spawn([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], Path(tempfile.gettempdir()))
    _await_answer(port, 180)
    return S3Server("moto", f"127.0.0.1:{port}")


def _start_radosgw() -> S3Server:
    """One monitor, one in-memory OSD, one gateway; about 15 s and 0.5 GB, all below one temporary folder."""
    folder = Path(tempfile.mkdtemp(prefix="rgw-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in ("run", "log", "mon", "osd", "rgw"):
        (folder / name).mkdir()
    monitor, port = f"127.0.0.1:{_free_port()}", _free_port()
    config = folder / "ceph.conf"
    config.write_text(_CEPH_CONF.format(dir=folder, fsid=uuid.uuid4(), monitor=monitor, port=port))
    fsid = next(line.split()[-1] for line in config.read_text().splitlines() if line.startswith("fsid"))
    osd = str(uuid.uuid4())

    def run(*command: str) -> None:
        _run([command[0], "-c", str(config), *command[1:]], folder)

    monmap = str(folder / "monmap")
    _run(
        ["monmaptool", "--create", "--clobber", "--fsid", fsid, "--addv", "a", f"[v2:{monitor}]", monmap],
        folder,
    )
    run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap)
    _spawn(["ceph-mon", "-c", str(config), "-i", "a", "-f"], folder)
    run("ceph", "osd", "new", osd)
    run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
    run("ceph", "osd", "crush", "add", "osd.0", "1.0", "root=default", "host=h")
    _spawn(["ceph-osd", "-c", str(config), "-i", "0", "-f"], folder)
    _spawn(["radosgw", "-c", str(config), "-n", "client.admin", "-f"], folder)
    keys = ("--access-key=testkey", "--secret=testsecret")
    run("radosgw-admin", "user", "create", "--uid=test", "--display-name=test", *keys)
    _await_answer(port, 180)
    return S3Server("radosgw", f"127.0.0.1:{port}")


def _run(command: Sequence[str], folder: Path) -> None:
    with open(folder / "log" / "start.log", "ab") as log:
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=180)


def _spawn(command: Sequence[str], folder: Path) -> None:
    """A server process that ends with this one."""
    if shutil.which("setpriv"):  # also when this one is killed
        command = ["setpriv", "--pdeathsig", "TERM", *command]
    with open(folder / f"spawned-{secrets.token_hex(3)}.log", "wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    owner = os.getpid()
    atexit.register(lambda: _end(process) if os.getpid() == owner else None)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(5)


def _free_port() -> int:
    """Below those that Linux gives to connections: it takes seconds until the server listens on it. Above Ray's."""
    dice = random.SystemRandom()
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", dice.randrange(20_000, 32_768)))
            return int(probe.getsockname()[1])


def _await_answer(port: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5):
                return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"nothing answers on port {port} after {seconds:.0f} s")


_CEPH_CONF = """[global]
fsid = {fsid}
mon host = v2:{monitor}
mon initial members = a
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd crush chooseleaf type = 0
osd pool default pg num = 4
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon warn on pool no redundancy = false
mon data avail warn = 1
mon data avail crit = 1
mon data = {dir}/mon
osd data = {dir}/osd
osd objectstore = memstore
memstore device bytes = 2147483648
ms mon client mode = crc
ms bind ipv4 = true
public network = 127.0.0.0/8
run dir = {dir}/run
log file = {dir}/log/$name.log
admin socket = {dir}/run/$name.asok
pid file = {dir}/run/$name.pid
rgw data = {dir}/rgw
rgw dns name = localhost
rgw frontends = beast endpoint=127.0.0.1:{port}
"""
