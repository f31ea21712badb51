"""S3 URIs to filesystems: time-outs that end, one request per small object, failures that say what to do.

In: `s3://bucket/path?option=value`. Out: pyarrow filesystems. Imported by `storage` when a URI asks for it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit

from ray_tracking.errors import StorageError

if TYPE_CHECKING:
    from pyarrow import fs

_TEXTS = frozenset({"region", "scheme", "endpoint_override", "tls_ca_file_path"})
_SWITCHES = frozenset({"allow_bucket_creation", "allow_bucket_deletion", "force_virtual_addressing"})
_NUMBERS = frozenset({"connect_timeout", "request_timeout", "max_attempts"})

_CREDENTIALS = {
    "access_key": "AWS_ACCESS_KEY_ID",
    "secret_key": "AWS_SECRET_ACCESS_KEY",
    "session_token": "AWS_SESSION_TOKEN",
}

# A server that does not answer at all: the first look at it gives up after about eight seconds.
_QUICK = {"connect_timeout": 3.0, "request_timeout": 3.5, "max_attempts": 2.0}
# At work a server may be slow for a while. `request_timeout` is a time without a byte, not a transfer's.
_PATIENT = {"connect_timeout": 3.0, "request_timeout": 10.0, "max_attempts": 3.0}


@dataclass(frozen=True)
class S3Options:
    """A parsed URI: `root` is bucket and path, `arguments` are those of `pyarrow.fs.S3FileSystem`."""

    root: str
    arguments: dict[str, Any] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)

    @property
    def bucket(self) -> str:
        return self.root.partition("/")[0]

    @classmethod
    def parse(cls, uri: str) -> S3Options:
        """Raises ValueError for an option that is not known or not readable."""
        parts = urlsplit(uri)
        bucket = parts.netloc.rpartition("@")[2]
        if not bucket:
            raise ValueError("it names no bucket")
        arguments: dict[str, Any] = {}
        numbers: dict[str, float] = {}
        if parts.username and parts.password:
            arguments["access_key"], arguments["secret_key"] = (
                unquote(parts.username),
                unquote(parts.password),
            )
        for name, value in parse_qsl(parts.query, keep_blank_values=True):
            if name in _TEXTS:
                arguments[name] = value
            elif name in _SWITCHES:
                arguments[name] = value.lower() in {"1", "true", "yes"}
            elif name in _NUMBERS:
                numbers[name] = float(value)
            else:
                allowed = ", ".join(sorted(_TEXTS | _SWITCHES | _NUMBERS))
                raise ValueError(f"the option {name!r} is not known; allowed: {allowed}")
        return cls(f"{bucket}/{unquote(parts.path).strip('/')}".rstrip("/"), arguments, numbers)

    def filesystem(self, *, quick: bool = False, with_credentials: bool = False) -> fs.S3FileSystem:
        """`quick` gives up early, for a first look; what the URI says about time-outs goes before both.

        `with_credentials`: those of this process's environment travel with it when it is pickled.
        """
        from pyarrow import fs

        numbers = {**(_QUICK if quick else _PATIENT), **self.numbers}
        arguments = dict(self.arguments)
        if with_credentials and "access_key" not in arguments:
            given = {name: os.environ[variable] for name, variable in _CREDENTIALS.items() if os.environ.get(variable)}
            arguments |= given if {"access_key", "secret_key"} <= given.keys() else {}
        if "region" not in arguments and "endpoint_override" not in arguments:
            arguments["region"] = fs.resolve_s3_region(self.bucket)
        return fs.S3FileSystem(
            **arguments,
            connect_timeout=numbers["connect_timeout"],
            request_timeout=numbers["request_timeout"],
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=int(numbers["max_attempts"])),
            allow_delayed_open=True,  # a small object is one PUT, whole or absent, not a multipart upload
        )

    def check(self) -> None:
        """One look: OSError if the server doesn't answer or refuses, StorageError if there is no bucket."""
        from pyarrow import fs

        quick = self.filesystem(quick=True)
        if quick.get_file_info(fs.FileSelector(self.root, allow_not_found=True)):
            return
        if quick.get_file_info(self.bucket).type == fs.FileType.NotFound:
            raise StorageError(
                f"There is no bucket {self.bucket!r} on this S3 server.",
                hint="Create it, or name another one with --storage or RAY_TRACKING_STORAGE.",
            )


def hint(error: BaseException) -> str | None:
    """What to do about a failure of S3, None if it tells nothing special."""
    text = str(error)
    if any(
        word in text
        for word in ("SIGNATURE_DOES_NOT_MATCH", "ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "HTTP status 403")
    ):
        return (
            "S3 refused the credentials: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (on every node) "
            "and what they may do in this bucket."
        )
    if "NETWORK_CONNECTION" in text or "curlCode" in text:
        return (
            "The S3 server does not answer: check the network and the URI "
            "(another server than AWS: s3://bucket/path?endpoint_override=HOST:PORT&scheme=http)."
        )
    return None
