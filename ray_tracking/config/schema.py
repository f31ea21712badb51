"""What the models say about a key: what is allowed there, and which key was probably meant. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, MinLen

from ray_tracking.config.models import Allowed, CheckpointConfig, Config, Section, TrainingConfig

Path = tuple[str, ...]


def field_of(kind: type[Section], key: object) -> tuple[Any, Sequence[Any]]:
    """(annotation, metadata) of a key of a section; (None, ()) if there is no such key."""
    field = kind.model_fields.get(key) if isinstance(key, str) else None
    if field is not None:
        return field.annotation, field.metadata
    return (CheckpointConfig, ()) if kind is TrainingConfig else (None, ())


def without_null(annotation: Any) -> tuple[Any, bool]:
    """(annotation without `| None`, whether it had it)."""
    if get_origin(annotation) in (Union, UnionType):
        parts = [part for part in get_args(annotation) if part is not NoneType]
        if len(parts) == 1:
            return parts[0], True
    return annotation, False


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def at(kind: type[Section], path: Sequence[object]) -> tuple[Any, Sequence[Any]]:
    """(annotation, metadata) of what stands at a path below a section; (None, ()) where nothing may stand."""
    annotation: Any = kind
    metadata: Sequence[Any] = ()
    for part in path:
        inner, _ = without_null(annotation)
        if get_origin(inner) is Annotated:
            inner = get_args(inner)[0]
        if is_section(inner):
            annotation, metadata = field_of(inner, part)
        elif get_origin(inner) is dict:
            annotation, metadata = get_args(inner)[1], ()
        elif get_origin(inner) in (list, tuple):
            annotation, metadata = get_args(inner)[0], ()
        else:
            return None, ()
    return annotation, metadata


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Any: "anything"}


def describe(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What a key may hold, in words: `a whole number, at least 1, or null`."""
    for mark in metadata:
        if isinstance(mark, Allowed):
            return mark.text
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return describe(args[0], args[1:])
    inner, nullable = without_null(annotation)
    if nullable:
        return f"{describe(inner, metadata)}, or null"
    if origin is Literal:
        words = ", ".join(map(str, args))
        return f"one of {words}" if len(args) > 1 else words
    if origin in (list, tuple):
        return "a list, each item " + describe(args[0])
    if origin is dict:
        return "a mapping" if args[1] is Any else "a mapping, each value " + describe(args[1])
    if is_section(annotation):
        return "a mapping with the keys " + ", ".join(annotation.model_fields)
    limits = [
        f"at least {mark.ge}"
        if isinstance(mark, Ge)
        else f"above {mark.gt}"
        if isinstance(mark, Gt)
        else f"at most {mark.le}"
        if isinstance(mark, Le)
        else "not empty"
        for mark in metadata
        if isinstance(mark, Ge | Gt | Le | MinLen)
    ]
    return ", ".join([_WORDS.get(annotation, "a plain value"), *limits])


def keys_of(kind: type[Section], path: Sequence[object]) -> tuple[str, ...]:
    """The keys a section at a path has; empty if there is no section."""
    inner, _ = without_null(at(kind, path)[0])
    return tuple(inner.model_fields) if is_section(inner) else ()


def all_keys(kind: type[Section], prefix: Path = ()) -> Iterator[Path]:
    """The path of every key below a section, sections before what is in them."""
    for key, field in kind.model_fields.items():
        yield (*prefix, key)
        inner, _ = without_null(field.annotation)
        if is_section(inner):
            yield from all_keys(inner, (*prefix, key))


def nearest(kind: type[Section], path: Sequence[object]) -> Path | None:
    """The key that was probably meant: a namesake elsewhere, a neighbour spelt alike, or any key spelt alike."""
    *parents, last = [str(part) for part in path]
    plain = last.lower().replace("-", "_")
    siblings = keys_of(kind, parents)
    everywhere = list(all_keys(kind))
    names = [known[-1] for known in everywhere]
    if plain in names and plain not in siblings:
        return everywhere[names.index(plain)]
    if close := get_close_matches(plain, siblings, n=1, cutoff=0.6):
        return (*parents, close[0])
    close = get_close_matches(plain, names, n=1, cutoff=0.75)
    return everywhere[names.index(close[0])] if close else None


def path_of(kind: type[Section]) -> Path:
    """Where a kind of section stands in a Config: ("experiment_tracking", "wandb"); () for Config."""
    for path in all_keys(Config):
        if without_null(at(Config, path)[0])[0] is kind:
            return path
    return ()
