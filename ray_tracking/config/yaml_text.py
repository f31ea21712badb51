"""YAML text to plain data, with the line of each key. Safe: no tags, no duplicate keys, bounded size.

Numbers are read as people mean them (`1e-3` is a number; `12:30`, `007` and dates are text), else YAML 1.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from ray_tracking.errors import ConfigError

MAX_BYTES = 256 * 1024
MAX_NODES = 10_000
"""Values in one file, with aliases written out."""
MAX_DEPTH = 40

_PREFIX = "tag:yaml.org,2002:"
_PLAIN_TAGS = frozenset(_PREFIX + name for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge"))


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed file: data, the line (from 1) of each key's path, (line, path, first line) of repeats."""

    data: Any
    lines: dict[tuple[str, ...], int] = field(default_factory=dict)
    duplicates: list[tuple[int, tuple[str, ...], int]] = field(default_factory=list)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  # PyYAML's own way

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"nested more than {MAX_DEPTH} levels deep",
                problem_mark=self.peek_event().start_mark,  # type: ignore[no-untyped-call]
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (
            ValueError,
            KeyError,
        ) as error:  # an explicit !!int or !!bool before other text; too many digits
            raise yaml.MarkedYAMLError(
                problem=f"{str(node.value)[:20]!r} can't be read as {node.tag.replace(_PREFIX, '')}",
                problem_mark=node.start_mark,
            ) from error


for _name, _pattern, _first in (
    ("bool", "yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)|[-+]?0x[0-9a-fA-F_]+|[-+]?0b[01_]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("merge", "<<", "<"),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(_PREFIX + _name, re.compile(f"^(?:{_pattern})$"), list(_first))


def parse(text: str, source: str) -> Document:
    """Parse one document. Raises ConfigError with `source` and line for anything but plain, bounded YAML."""
    if len(text) > MAX_BYTES:
        raise too_large(source)
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return Document(None)
            document = _inspect(root, source)
            return Document(
                loader.construct_document(root),
                document.lines,
                document.duplicates,
            )
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        raise _syntax(error, source) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{source}, line {line}: a character that YAML does not allow (number {error.character:#04x}).",
            hint="Allowed: printable text in UTF-8. Remove the character.",
        ) from error


def too_large(source: str) -> ConfigError:
    return ConfigError(
        f"{source}: larger than a configuration may be.", hint=f"Allowed: at most {MAX_BYTES // 1024} KiB."
    )


def _syntax(error: yaml.MarkedYAMLError, source: str) -> ConfigError:
    mark = error.problem_mark or error.context_mark
    where = f"{source}, line {mark.line + 1}, column {mark.column + 1}" if mark else source
    found = "; ".join(part for part in (error.context, error.problem) if part)
    if "'\\t'" in found:
        hint = "Indent with spaces; YAML does not allow tabs there."
    elif "single document" in found:
        hint = "Keep one document per file: remove what follows the second '---'."
    elif "levels deep" in found or "can't be read" in found:
        hint = "Change or remove this value."
    else:
        hint = "Check indentation, brackets and quotes here and one line above; quote text with ': ' in it."
    return ConfigError(f"{where}: not valid YAML: {found}.", hint=hint)


def _inspect(root: yaml.Node, source: str) -> Document:
    """Look at every node, aliases written out, before any value is made."""
    result = Document(None)
    stack: list[tuple[yaml.Node, tuple[str, ...], int]] = [(root, (), 1)]
    count = 0
    while stack:
        node, path, depth = stack.pop()
        count += 1
        line = node.start_mark.line + 1
        if count > MAX_NODES or depth > MAX_DEPTH:
            raise ConfigError(
                f"{source}, line {line}: too many values or levels, its aliases (*name) written out.",
                hint=f"Allowed: {MAX_NODES} values, {MAX_DEPTH} levels. Use fewer aliases.",
            )
        if node.tag not in _PLAIN_TAGS:
            tag = node.tag.replace(_PREFIX, "!!")
            raise ConfigError(
                f"{source}, line {line}: the tag {tag} is refused.",
                hint="Allowed: plain YAML (mappings, lists, text, numbers, true, false, null).",
            )
        if isinstance(node, yaml.MappingNode):
            stack.extend((child, below, depth + 1) for child, below in _entries(node, path, result))
        elif isinstance(node, yaml.SequenceNode):
            stack.extend((child, (*path, str(index)), depth + 1) for index, child in enumerate(node.value))
    return result


def _entries(
    node: yaml.MappingNode, path: tuple[str, ...], result: Document
) -> Iterator[tuple[yaml.Node, tuple[str, ...]]]:
    seen: dict[tuple[str, str], int] = {}
    for key, value in node.value:
        yield key, path
        below = path
        if isinstance(key, yaml.ScalarNode):
            below = (*path, key.value)
            line = key.start_mark.line + 1
            identity = (key.tag, key.value)
            if identity in seen:
                result.duplicates.append((line, below, seen[identity]))
            else:
                seen[identity] = line
            result.lines[below] = line
        yield value, below
