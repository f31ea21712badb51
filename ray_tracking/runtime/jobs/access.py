"""Where the Jobs API is, and what lets us in: `--address` and Ray's own variables. No ray, no network.

In: what was given and the environment. Out: an http(s) URL, a token; or a UsageError with what to write instead.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from ray_tracking.errors import UsageError

ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""In this order, after `--address`."""
TOKEN_FIX = (
    "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token "
    "(default: ~/.ray/auth_token, chmod 600)."
)
_FORM = "the address of the cluster's dashboard, such as http://HOST:8265"


@dataclass(frozen=True, slots=True)
class Token:
    """`value` is None if there is none or none is to be sent; `source`: where it came from, for people."""

    value: str | None = field(repr=False)
    source: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.value}"} if self.value else {}


def jobs_address(given: str | None, environment: Mapping[str, str]) -> str:
    """The URL of the Jobs API, without a slash at its end. Raises UsageError that says what to write instead."""
    for source in ("--address", *ADDRESS_VARIABLES):
        address = given if source == "--address" else environment.get(source)
        if address:
            return _checked(address.strip(), source)
    raise UsageError(
        "Which cluster? No address was given.",
        hint=f"Give {_FORM}, with --address or in RAY_API_SERVER_ADDRESS.",
    )


def _checked(address: str, source: str) -> str:
    said = f"{source} is {_without_user(address)!r}"
    scheme, separator, rest = address.partition("://")
    try:
        parts = urlsplit(address if separator else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"{said}: {error}.", hint=f"Give {_FORM}.") from None
    if separator and scheme in ("http", "https"):
        if not host:
            raise UsageError(f"{said}: it has no host.", hint=f"Give {_FORM}.")
        return address.rstrip("/")
    example = f"http://{host or 'HOST'}:8265"
    if separator and scheme == "ray":
        raise UsageError(
            f"{said}: that is an address of Ray Client, which runs no jobs.",
            hint=f"Give {_FORM}: {example}, say.",
        )
    if not separator and address in ("auto", "local"):
        raise UsageError(f"{said}: a job needs to know where to go.", hint=f"Give {_FORM}: http://127.0.0.1:8265, say.")
    if separator:
        raise UsageError(f"{said}: {scheme}:// is no address of the Jobs API.", hint=f"Give {_FORM}.")
    what = "that is the cluster's own port, where drivers connect" if port == 6379 else "a job goes to the dashboard"
    shown = f"http://{rest or address}" if port not in (None, 6379) else example
    raise UsageError(f"{said}: {what}.", hint=f"Give {_FORM}: {shown}, say. --address counts first.")


def find_token(environment: Mapping[str, str]) -> Token:
    """Ray's token, from where Ray looks for it in its order. None is sent with RAY_AUTH_MODE=disabled.

    Raises UsageError if RAY_AUTH_TOKEN_PATH names a file that can't be read.
    """
    mode = environment.get("RAY_AUTH_MODE", "").lower()
    if mode == "disabled":
        return Token(None, "RAY_AUTH_MODE is disabled")
    if token := environment.get("RAY_AUTH_TOKEN", "").strip():
        return Token(token, "RAY_AUTH_TOKEN")
    if path := environment.get("RAY_AUTH_TOKEN_PATH"):
        return Token(_read(Path(path), "RAY_AUTH_TOKEN_PATH"), path)
    default = Path(environment.get("HOME") or os.path.expanduser("~")) / ".ray" / "auth_token"
    if default.is_file():
        return Token(_read(default, "Ray's default place"), str(default))
    return Token(None, f"there is none in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or {default}")


def _read(path: Path, source: str) -> str | None:
    try:
        return path.read_text().strip() or None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"The token file {path} ({source}) can't be read: {reason}.", hint=TOKEN_FIX) from error


def _without_user(address: str) -> str:
    before, at, after = address.rpartition("@")
    scheme, separator, _ = before.partition("://")
    return f"{scheme}{separator}{after}" if at and separator else address
