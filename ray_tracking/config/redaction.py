"""Secrets out: before a configuration, a log line or a traceback goes anywhere.

In: any plain value or text. Out: the same with "[removed]" in place of what looks like a secret, by its name,
by its shape, by standing in an environment variable with a secret name, or in a URL's user part.
Reads os.environ, changes nothing.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

from ray_tracking.config.secret_names import is_secret_name, is_secret_variable, is_strong_name

REMOVED = "[removed]"

_MIN_VARIABLE = 8
"""Shorter values of environment variables are too likely to be ordinary words."""
_MAX_DEPTH = 64

_SHAPES = re.compile(
    r"""
      -----BEGIN[ A-Z]*PRIVATE[ ]KEY-----.*?(?:-----END[ A-Z]*PRIVATE[ ]KEY-----|\Z)
    | (?<![A-Za-z0-9])(?:
          gh[pousr]_[A-Za-z0-9]{20,} | github_pat_[A-Za-z0-9_]{20,} | glpat-[A-Za-z0-9_-]{16,}
        | sk-(?=[A-Za-z_-]{0,60}[0-9])[A-Za-z0-9_-]{16,} | [sr]k_(?:live|test)_[A-Za-z0-9]{16,}
        | A(?:KIA|SIA)[0-9A-Z]{16} | AIza[A-Za-z0-9_-]{35}
        | xox[a-z]-[A-Za-z0-9-]{10,} | xapp-[A-Za-z0-9-]{10,}
        | hf_[A-Za-z0-9]{20,} | npm_[A-Za-z0-9]{30,} | pypi-[A-Za-z0-9_-]{30,}
        | wandb_v[0-9]_[A-Za-z0-9_]{20,}
        | eyJ[A-Za-z0-9_-]{5,1000}+\.[A-Za-z0-9_-]{5,}(?:\.[A-Za-z0-9_-]*)?
      )
    """,
    re.VERBOSE | re.DOTALL,
)
_USER_PART = re.compile(
    r"""([A-Za-z][A-Za-z0-9+.-]{0,30}+://)
        (?: [^\s/?\#"'<>@]{0,400}+ (?:@[^\s/?\#"'<>@]{0,400}+){0,20}   # RFC 3986; @ in the password
          | [^\s/:@"'<>]{0,400}+:(?![0-9]+[/?\#])[^\s@"'<>]{0,400}+   # / in the password; not host:port/
        )(?=@)""",
    re.VERBOSE,
)
_SIGNATURE = re.compile(r"([?&](?:sig|signature|x-amz-signature|x-goog-signature)=)[^&\s\"']+", re.IGNORECASE)
_BEARER = re.compile(r"\b(bearer\s+)[A-Za-z0-9._~+/=-]{16,}", re.IGNORECASE)
_COOKIE = re.compile(r"\b((?:set-)?cookie\s*+:\s*+)[^\r\n\"']+", re.IGNORECASE)
_NAME = re.compile(
    r"""(?P<name>[A-Za-z_][\w.-]{0,100}+) (?:\\*["'])?+ \]?+ \s*+ (?: => | ==?+ | := | : ) \s*+
      | (?<![\w-])(?P<flag>--?[A-Za-z][\w-]{0,100}+) (?: ["'],\s*+(?=["']) | [ \t]++ (?!-) )""",
    re.VERBOSE,
)
"""A name in text and what leads to its value: `name=`, `"name": `, `['name'] = `, `--name `, `'--name', `."""
_VALUE = re.compile(
    r"""(?:(?:bearer|basic|token|digest)\s++)?+
        (?: [\[{][^\]}\n]*[\]}](?:(?!\\*["'])[^\s&])*
          | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*' | (?P<quote>\\+["'])(?:(?!(?P=quote)).)*(?P=quote)
          | (?:(?!\\*["'])[^\s&])+ | \\*["'][^\r\n]* )""",
    re.VERBOSE | re.IGNORECASE,
)
_SCHEMES = frozenset(("bearer", "basic", "token", "digest"))
_HARMLESS = re.compile(r"^[\"'\\]*(?:[-+]?[0-9]{1,7}(?:\.[0-9]*)?|true|false|none|null|)[\"'\\,;)\]}]*$", re.IGNORECASE)


def redact(value: Any) -> Any:
    """A copy of `value` without secrets, looking into mappings, lists, tuples, sets, text, bytes and paths.

    Under a secret name all goes but None, bool and numbers (under password, secret, passphrase numbers too).
    Other numbers and objects of other types stay as they are. Keys that differ only in a secret become one.
    Applying it twice changes nothing more.
    """
    return _walk(value, _variables(), 0)


def redact_text(text: str) -> str:
    """The same for a log line, traceback or command line, with `name=value`, `--name value` in it."""
    return _text(text, _variables())


def _variables() -> re.Pattern[str] | None:
    """A pattern of the values of secret environment variables, also as they look in URLs and JSON."""
    values: set[str] = set()
    for name in list(os.environ):  # another thread may change it meanwhile
        value = os.environ.get(name, "")
        if len(value) >= _MIN_VARIABLE and is_secret_variable(name):
            values |= {value, quote(value, safe=""), json.dumps(value)[1:-1], repr(value)[1:-1]}
    longest_first = sorted(values, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _walk(value: Any, variables: re.Pattern[str] | None, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        return REMOVED  # nested beyond what can be looked into: nothing of it is let through
    if isinstance(value, str):
        return _text(value, variables)
    if isinstance(value, bytes):
        text = value.decode("utf-8", "surrogateescape")
        return _text(text, variables).encode("utf-8", "surrogateescape")
    if isinstance(value, PurePath):
        clean = _text(str(value), variables)
        return value if clean == str(value) else clean
    if isinstance(value, Mapping):
        return _mapping(value, variables, depth)
    if isinstance(value, list | tuple):
        items = _arguments([_walk(item, variables, depth + 1) for item in value])
        if isinstance(value, list):
            return items
        if len(items) == 2 and _names_secret(items[0]):
            items[1] = _hidden(items[0], value[1])  # a header or parameter as a pair
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, set | frozenset):
        return type(value)(_walk(item, variables, depth + 1) for item in value)
    return value


def _mapping(value: Mapping[Any, Any], variables: re.Pattern[str] | None, depth: int) -> dict[Any, Any]:
    result = {}
    # {name: PASSWORD, value: ...} is how Kubernetes and many a list of settings write a pair
    names = (_walk(value.get(key), variables, depth + 1) for key in ("name", "key"))
    named = next((name for name in names if _names_secret(name)), None)
    for key, item in value.items():
        clean = _text(key, variables) if isinstance(key, str) else key
        if _names_secret(clean):
            result[clean] = _hidden(clean, item)
        elif named is not None and clean == "value":
            result[clean] = _hidden(named, item)
        else:
            result[clean] = _walk(item, variables, depth + 1)
    return result


def _names_secret(name: object) -> bool:
    return isinstance(name, str) and is_secret_name(name)


def _hidden(name: str, value: Any) -> Any:
    if value is None or isinstance(value, bool) or (isinstance(value, str | bytes) and not value):
        return value
    if isinstance(value, int | float) and not is_strong_name(name):
        return value
    return REMOVED


def _arguments(items: list[Any]) -> list[Any]:
    """A command line as a list: what follows a flag with a secret name goes."""
    for index, (flag, item) in enumerate(pairwise(items)):
        is_flag = isinstance(flag, str) and flag.startswith("-") and "=" not in flag
        if is_flag and is_secret_name(flag) and isinstance(item, str) and not item.startswith("--"):
            items[index + 1] = REMOVED
    return items


def _text(text: str, variables: re.Pattern[str] | None) -> str:
    """To the fixed point: what one round takes out can show the next one more. Each round removes text."""
    while True:
        parts = text.split(REMOVED)  # what was removed is never looked at again, so that this ends
        clean = REMOVED.join(_part(part, variables) for part in parts)
        if clean == text:
            return clean
        text = clean


def _part(text: str, variables: re.Pattern[str] | None) -> str:
    if variables is not None:
        text = variables.sub(REMOVED, text)
    text = _SHAPES.sub(REMOVED, text)
    if "://" in text:
        text = _USER_PART.sub(_hide_user, text)
    text = _SIGNATURE.sub(rf"\1{REMOVED}", text)
    text = _COOKIE.sub(rf"\1{REMOVED}", text)
    text = _hide_named(text)
    return _BEARER.sub(rf"\1{REMOVED}", text)


def _hide_user(match: re.Match[str]) -> str:
    return f"{match[1]}{REMOVED}" if len(match[0]) > len(match[1]) else match[0]


def _hide_named(text: str) -> str:
    """Take out the value after each secret name; what follows any other name may hold one too."""
    kept, start, position = [], 0, 0
    while match := _NAME.search(text, position):
        position = match.end()
        name = match["name"] or match["flag"]
        value = _VALUE.match(text, position) if is_secret_name(name) else None
        if value is not None and _is_secret_value(name, value[0]):
            kept += [text[start:position], REMOVED]
            start = position = value.end()
    return "".join([*kept, text[start:]])


def _is_secret_value(name: str, value: str) -> bool:
    if value.lower() in _SCHEMES or value.strip("\"'\\,;)}") == REMOVED:
        return False
    is_number_to_hide = is_strong_name(name) and any(character.isdigit() for character in value)
    return is_number_to_hide or not _HARMLESS.match(value)
