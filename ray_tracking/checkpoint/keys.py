"""The keys of encrypted checkpoints: who can seal, who can open, and the data key of each save.

Two levels. A *key* is the user's: it comes from a file, a variable or a command and only ever wraps data keys.
A *data key* is made anew for each save of each rank; it stands in the manifest once for every key that may open
the checkpoint, wrapped with AES key wrap (RFC 3394), and everything else is derived from it (HKDF-SHA-256,
one label per purpose). No secret is shown by repr, str, pickle, copy or an error.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from ray_tracking.checkpoint.key_sources import KEY_BYTES, SOURCES, generate_key, parse_key, read_secret
from ray_tracking.errors import ConfigError, RefusedError

__all__ = [
    "DataKey",
    "Key",
    "Keyring",
    "SealBrokenError",
    "WrongKeyError",
    "generate_key",
    "key_of",
    "key_variables",
    "no_key_error",
]

SECTION = "training.default.encryption"
"""Where the keys stand in a configuration."""

_ID_LABEL = b"ray-tracking checkpoint key id v1\0"
_WRAP_LABEL = b"ray-tracking checkpoint key wrap v1"
_FILE_LABEL = b"ray-tracking checkpoint file v1\0"
_MAC_LABEL = b"ray-tracking checkpoint manifest mac v1"
_ID = re.compile(r"[0-9a-f]{16}")


class SealBrokenError(ValueError):
    """What is stored is not what was sealed, or was sealed under another name or data key; the text is the reason."""


class WrongKeyError(RefusedError):
    """None of the keys at hand opens the checkpoint: names the keys that do."""


class _Secret:
    """Holds 32 secret bytes that don't show by accident."""

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        if len(secret) != KEY_BYTES:
            raise ValueError(f"a key has {KEY_BYTES} bytes, not {len(secret)}")
        self._secret = secret

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} is secret: it can't be pickled or copied.")

    def _derive(self, label: bytes, salt: bytes | None = None) -> bytes:
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        return HKDF(SHA256(), KEY_BYTES, salt, label).derive(self._secret)


class Key(_Secret):
    """A user's key. `id` tells it from others and nothing about it: 16 hex characters of a hash of its own."""

    __slots__ = ("id",)

    def __init__(self, secret: bytes) -> None:
        super().__init__(secret)
        self.id = hashlib.sha256(_ID_LABEL + secret).hexdigest()[:16]

    def __repr__(self) -> str:
        return f"Key({self.id})"

    def wrap(self, secret: bytes) -> bytes:
        from cryptography.hazmat.primitives.keywrap import aes_key_wrap

        return aes_key_wrap(self._derive(_WRAP_LABEL), secret)

    def unwrap(self, wrapped: bytes) -> bytes | None:
        """None if it was wrapped by another key or altered."""
        from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap

        try:
            return aes_key_unwrap(self._derive(_WRAP_LABEL), wrapped)
        except InvalidUnwrap:
            return None


def key_of(text: str) -> Key:
    """The key that a line of `generate_key` is."""
    return Key(parse_key(text))


class DataKey(_Secret):
    """The key of one save of one rank. `wrapped`: what the manifest holds, [{"id": hex, "wrapped": base64}]."""

    __slots__ = ("wrapped",)

    def __init__(self, secret: bytes, wrapped: Iterable[Mapping[str, str]] = ()) -> None:
        super().__init__(secret)
        self.wrapped = [dict(entry) for entry in wrapped]

    def __repr__(self) -> str:
        return f"DataKey(for {', '.join(_ids(self.wrapped)) or 'nobody'})"

    @property
    def secret(self) -> bytes:
        """For the process that writes, and nobody else: `DataKey(secret)` there seals the same."""
        return self._secret

    def file_key(self, salt: bytes, context: bytes) -> bytes:
        """The AES-256 key of one file: of its salt, and of all that `context` says about it."""
        return self._derive(_FILE_LABEL + context, salt)

    def mac(self, body: bytes | memoryview) -> str:
        """HMAC-SHA-256 over a manifest, in hex."""
        return hmac.new(self._derive(_MAC_LABEL), body, hashlib.sha256).hexdigest()

    def has_mac(self, body: bytes | memoryview, claimed: object) -> bool:
        """Whether `claimed`, from a manifest and so anything, is that; takes the same time whatever it is."""
        return hmac.compare_digest(self.mac(body).encode(), str(claimed).encode("utf-8", "replace"))


class Keyring:
    """Every key of a configuration. `sealing` is None where only old checkpoints are to be opened.

    With `refuse_plain` no checkpoint counts that is not encrypted.
    """

    def __init__(
        self,
        sealing: Key | None,
        recipients: Iterable[Key] = (),
        old_keys: Iterable[Key] = (),
        *,
        refuse_plain: bool = False,
    ) -> None:
        self.refuse_plain = refuse_plain
        self._sealing = sealing
        new = {key.id: key for key in (sealing, *recipients) if key is not None}
        self._new = tuple(new.values())
        self._by_id = {**{key.id: key for key in old_keys}, **new}

    @classmethod
    def from_config(cls, section: Mapping[str, Any] | None) -> Keyring | None:
        """The keys that `training.default.encryption` names, read now; None without such a section.

        Raises ConfigError that names the key of the configuration and never shows a secret.
        """
        if section is None:
            return None
        further = {
            name: [
                Key(read_secret(source, f"{SECTION}.{name}[{index}]"))
                for index, source in enumerate(section.get(name) or ())
            ]
            for name in ("recipients", "old_keys")
        }
        named = any(section.get(name) is not None for name in SOURCES)
        # With no key at all, reading one says what is missing.
        sealing = Key(read_secret(section, SECTION)) if named or not any(further.values()) else None
        plain = bool(section.get("refuse_plain"))
        return cls(sealing, further["recipients"], further["old_keys"], refuse_plain=plain)

    def __repr__(self) -> str:
        return f"Keyring({', '.join(self.ids)})"

    @property
    def ids(self) -> tuple[str, ...]:
        """Of all keys that open something, the one that seals first."""
        return tuple(dict.fromkeys([*(key.id for key in self._new), *self._by_id]))

    @property
    def can_seal(self) -> bool:
        return self._sealing is not None

    def new_data_key(self) -> DataKey:
        """A fresh one, for the key that seals and all recipients. Raises ConfigError without a key that seals."""
        if self._sealing is None:
            raise ConfigError(
                f"{SECTION} has keys that open old checkpoints, but none that seals new ones.",
                hint=f"Set one of {', '.join(SOURCES)} there.",
            )
        secret = secrets.token_bytes(KEY_BYTES)
        return DataKey(
            secret,
            [{"id": key.id, "wrapped": base64.b64encode(key.wrap(secret)).decode("ascii")} for key in self._new],
        )

    def open(self, wrapped: Sequence[Mapping[str, Any]]) -> DataKey:
        """The data key of a checkpoint, from `encryption.keys` of its manifest.

        Raises WrongKeyError if no key here is one of its keys, SealBrokenError if one is and its entry was altered.
        """
        known = False
        for entry in _entries(wrapped):
            key = self._by_id.get(str(entry.get("id")))
            if key is None:
                continue
            known = True
            secret = key.unwrap(_decoded(entry.get("wrapped")))
            if secret is not None and len(secret) == KEY_BYTES:
                return DataKey(secret, [each for each in _entries(wrapped) if _is_whole(each)])
        if known:
            raise SealBrokenError("the wrapped data key in the manifest was altered")
        raise WrongKeyError(
            f"It is encrypted for {_list(_ids(wrapped))}; {SECTION} has {_list(self.ids)}, which can't open it.",
            hint=f"Set {SECTION}.old_keys (or key_file, key_env, key_command) to where one of its keys is.",
        )


def key_variables(section: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The environment variables that `training.default.encryption` takes keys from."""
    if section is None:
        return ()
    sources = [section, *(section.get("recipients") or ()), *(section.get("old_keys") or ())]
    return tuple(source["key_env"] for source in sources if source.get("key_env"))


def no_key_error(wrapped: Sequence[Mapping[str, Any]]) -> WrongKeyError:
    """For an encrypted checkpoint where no encryption is configured."""
    return WrongKeyError(
        f"It is encrypted for {_list(_ids(wrapped))}, and {SECTION} is not set.",
        hint=f"Set {SECTION}.key_file, key_env or key_command to where one of its keys is.",
    )


def _entries(wrapped: object) -> list[Mapping[str, Any]]:
    """The entries that have the shape of one; what stands in a manifest is not to be trusted."""
    return [entry for entry in wrapped if isinstance(entry, Mapping)] if isinstance(wrapped, list | tuple) else []


def _ids(wrapped: object) -> list[str]:
    return [entry["id"] for entry in _entries(wrapped) if _ID.fullmatch(str(entry.get("id")))]


def _is_whole(entry: Mapping[str, Any]) -> bool:
    return isinstance(entry.get("id"), str) and isinstance(entry.get("wrapped"), str)


def _decoded(text: object) -> bytes:
    try:
        return base64.b64decode(str(text), validate=True)
    except (binascii.Error, ValueError):
        return b""


def _list(ids: Sequence[str]) -> str:
    return ("key " if len(ids) == 1 else "keys ") + ", ".join(ids) if ids else "no key that can be named"
