"""Making a file only if there is none of its name: what decides between writers that start at once.

In: a name and bytes that are the caller's alone. Out: whether this call made the file; it is whole, or not there.
Local disks (NFS too) decide by a hard link, S3 by `If-None-Match: *`; elsewhere the last one to write wins, see below.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ray_tracking.s3 import _PATIENT, S3Options
from ray_tracking.writing import TEMPORARY, fsync_folder, make_folder

if TYPE_CHECKING:
    from ray_tracking.storage import Storage

SETTLE_SECONDS = 3.0
"""Without conditional writes: how long after a write another one may still overwrite it."""

NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK})
_EXISTS = frozenset({"PreconditionFailed", "412"})
_CONFLICT = frozenset({"ConditionalRequestConflict", "409"})
_TRIES = 5


def is_exclusive(storage: Storage) -> bool:
    """Whether this storage itself decides who was first. On S3 that takes boto3: pyarrow knows no conditions."""
    return storage.is_local or (storage.filesystem.type_name == "s3" and find_spec("boto3") is not None)


def create_new(storage: Storage, name: str, data: bytes) -> bool:
    """False if there is a file of that name. Raises OSError; it may have been made then: read it back."""
    path = storage.path(name)
    if storage.is_local:
        return _link_new(path, data)
    if is_exclusive(storage):
        return _put_new(S3Options.parse(storage.uri), path, data)
    return _write_and_settle(storage, name, data)


def _link_new(path: str, data: bytes) -> bool:
    """A hard link fails if the name is taken, on NFS as well, and shows the file only when it is whole and durable."""
    folder = os.path.dirname(path)
    make_folder(folder)
    temporary = os.path.join(folder, f"{TEMPORARY}{secrets.token_hex(8)}")
    try:
        _write_exclusively(temporary, data)
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return _open_new(path, data)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    fsync_folder(folder)
    return True


def _open_new(path: str, data: bytes) -> bool:
    """For file systems without hard links: a process killed here leaves a file that is empty or cut off."""
    try:
        _write_exclusively(path, data)
    except FileExistsError:
        return False
    fsync_folder(os.path.dirname(path))
    return True


def _write_exclusively(path: str, data: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(file, rest) :]
        os.fsync(file)
    except OSError:
        os.unlink(path)
        raise
    finally:
        os.close(file)


def _put_new(options: S3Options, path: str, data: bytes) -> bool:
    from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]

    bucket, _, key = path.partition("/")
    try:
        client = _client(options)
        for attempt in range(_TRIES):
            try:
                client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
            except ClientError as error:
                code = error.response.get("Error", {}).get("Code")
                if code in _EXISTS:
                    return False
                if code not in _CONFLICT or attempt == _TRIES - 1:
                    raise
                time.sleep(0.1 * 2**attempt)  # another one is being made or deleted just now: not decided yet
            else:
                return True
    except (BotoCoreError, ClientError) as error:
        raise OSError(errno.EIO, str(error)) from error
    raise AssertionError("the last try returns or raises")


def _client(options: S3Options) -> Any:
    """boto3's client for where pyarrow's filesystem of the same URI goes. Credentials: the URI's, else boto3's own."""
    import boto3  # type: ignore[import-untyped]
    from botocore.config import Config  # type: ignore[import-untyped]

    given, numbers = options.arguments, {**_PATIENT, **options.numbers}
    endpoint = given.get("endpoint_override")
    if endpoint and "://" not in endpoint:
        endpoint = f"{given.get('scheme', 'https')}://{endpoint}"
    virtual = given.get("force_virtual_addressing", not endpoint)
    return boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint,
        region_name=given.get("region") or (options.filesystem().region if not endpoint else "us-east-1"),
        aws_access_key_id=given.get("access_key"),
        aws_secret_access_key=given.get("secret_key"),
        verify=given.get("tls_ca_file_path"),
        config=Config(
            connect_timeout=numbers["connect_timeout"],
            read_timeout=numbers["request_timeout"],
            retries={"mode": "standard", "total_max_attempts": int(numbers["max_attempts"])},
            s3={"addressing_style": "virtual" if virtual else "path"},
            request_checksum_calculation="when_required",  # servers other than AWS's don't all know the newer ones
            response_checksum_validation="when_required",
        ),
    )


def _write_and_settle(storage: Storage, name: str, data: bytes) -> bool:
    """Weaker: two may both believe it if one is held up for `SETTLE_SECONDS` between its look and its write."""
    if storage.exists(name):
        return False
    storage.write_bytes(name, data)
    time.sleep(SETTLE_SECONDS)
    return storage.read_bytes(name) == data
