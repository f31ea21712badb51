"""How a name that a backend refuses is replaced: readable part plus a digest of the whole name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from hashlib import blake2s

_DIGEST = 12


def with_digest(name: str, *, replace: re.Pattern[str], limit: int) -> str:
    """A stand-in for `name` of at most `limit` characters: what `replace` matches becomes `_`, a digest follows."""
    digest = blake2s(name.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST]
    readable = replace.sub("_", name)[: limit - _DIGEST - 1].strip("/. _")
    return f"{readable}-{digest}" if readable else digest


def fitting(name: str, *, replace: re.Pattern[str], limit: int) -> str:
    """`name` itself where the backend takes it, else its stand-in: the same in every process."""
    if name and len(name) <= limit and not replace.search(name):
        return name
    return with_digest(name, replace=replace, limit=limit)


class CaseFolded:
    """Keeps names apart that differ only in case, for stores that would merge them (MySQL, some servers).

    The first spelling of a name stays, any other one gets a digest. `known` are the names already in the store,
    so that a later process decides as the first one did.
    """

    def __init__(self, known: Iterable[str] = ()) -> None:
        self._spelling: dict[str, str] = {}
        for name in known:
            self._spelling.setdefault(name.casefold(), name)

    def __call__(self, name: str, *, limit: int) -> str:
        if self._spelling.setdefault(name.casefold(), name) == name:
            return name
        return with_digest(name, replace=_NOTHING, limit=limit)


_NOTHING = re.compile(r"(?!)")
