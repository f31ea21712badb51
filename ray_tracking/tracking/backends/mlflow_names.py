"""Names and lengths that MLflow takes.

In: keys as logged. Out: names that every MLflow store accepts and keeps apart, and the tags that hold the originals.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterable, Mapping

from ray_tracking.tracking.backends.media import storable
from ray_tracking.tracking.backends.names import CaseFolded, fitting, with_digest

PARAM_LIMIT = 6000
TAG_LIMIT = 5000  # what servers before 2.x take; newer ones take 8000
NAME_TAG = "ray_tracking.name."
_NAME_LIMIT = 250 - len(NAME_TAG)
_REFUSED = re.compile(r"[^/\w.\- :]")
_REFUSED_IN_PATH = re.compile(r"[^A-Za-z0-9/_.=@+-]")


def original_name(name: str, tags: Mapping[str, str]) -> str:
    """The key as it was logged, from a name in MLflow and the run's tags."""
    original = tags.get(NAME_TAG + name)
    return name if original is None else str(json.loads(original))


def path_name(key: str) -> str:
    """`key` as a relative artifact path."""
    name = fitting(key, replace=_REFUSED_IN_PATH, limit=150)
    return name if _is_plain_path(name) else with_digest(key.replace("/", "_"), replace=_REFUSED_IN_PATH, limit=150)


def _is_plain_path(name: str) -> bool:
    return posixpath.normpath(name) == name and not name.startswith((".", "/"))


class Names:
    """key -> (name, tags to set: the original of a changed name, once). `known` and `tags` are what the run has."""

    def __init__(
        self, known: Iterable[str] = (), tags: Mapping[str, str] | None = None, *, folds_case: bool = False
    ) -> None:
        self._cache: dict[str, str] = {}
        self._tagged = set(tags or ())
        self._sending: set[str] = set()
        self._folded = CaseFolded(known) if folds_case else None

    def __call__(self, key: str) -> tuple[str, dict[str, str]]:
        name = self._cache.get(key)
        if name is None:
            name = self._cache[key] = self._decide(key)
        tag = NAME_TAG + name
        if name == key or tag in self._tagged:
            return name, {}
        self._sending.add(tag)
        return name, {tag: storable(json.dumps(key), TAG_LIMIT)}

    def remember(self) -> None:
        """The tags given out are in the store: don't give them out again."""
        self._tagged |= self._sending
        self._sending.clear()

    def _decide(self, key: str) -> str:
        name = fitting(key, replace=_REFUSED, limit=_NAME_LIMIT)
        if not _is_plain_path(name):
            name = with_digest(key.replace("/", "_"), replace=_REFUSED, limit=_NAME_LIMIT)
        return name if self._folded is None else self._folded(name, limit=_NAME_LIMIT)
