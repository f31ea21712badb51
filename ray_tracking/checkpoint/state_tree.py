"""What stands in a state file: the tree of each object, and which tensors it needs. No torch, no I/O.

In: the bytes of a verified state file. Out: `StateTree`. ValueError, KeyError, TypeError and their like for what
`describe` did not write.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_FAMILIES = ("model", "state")


@dataclass(frozen=True, slots=True)
class StateTree:
    """The tree of an object in the document of rank `where`: its tensors' files, their names, and of sharded ones
    (whole shape, dtype).
    """

    where: int
    family: str
    body: Any
    whole: tuple[str, ...]
    sharded: Mapping[str, tuple[tuple[int, ...], str]]


def read_document(data: memoryview) -> dict[str, Any]:
    document = json.loads(str(data, "utf-8"))
    if not isinstance(document["objects"], dict) or not isinstance(document["pieces"], dict):
        raise TypeError("objects and pieces are not by name")
    return {"objects": document["objects"], "pieces": document["pieces"]}


def read_tree(where: int, entry: Any) -> StateTree:
    family, body = entry["file"], entry["tree"]
    if family not in _FAMILIES:
        raise ValueError(f"tensors lie in {family!r}")
    whole: dict[str, None] = {}
    sharded: dict[str, tuple[tuple[int, ...], str]] = {}
    waiting = [body]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting.extend(item)
        elif isinstance(item, dict):
            tag = item.get("$")
            if tag == "tensor":
                whole[item["name"]] = None
            elif tag == "sharded":
                sharded[item["name"]] = tuple(item["shape"]), item["dtype"]
            elif tag in ("bytes", "bytearray", "array") and "tensor" in item:
                whole[item["tensor"]] = None
            else:
                waiting.extend(item.values())
    return StateTree(where, family, body, tuple(whole), sharded)
