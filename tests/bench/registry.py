"""Which figures there are: every file `p<number>_<subject>.py` of this package."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from tests.bench.measures import Measurement, Setup

_FILE = re.compile(r"p(\d+)_\w+")


@dataclass(frozen=True, slots=True)
class Figure:
    """`name` as in the design (P1, P2, ...); `title` says what is measured."""

    name: str
    module: str
    title: str

    def load(self) -> Callable[[Setup], list[Measurement]]:
        """Its measuring function, whose imports may be heavy."""
        measure: Callable[[Setup], list[Measurement]] = import_module(f"{__package__}.{self.module}").measure
        return measure


def figures(folder: Path | None = None) -> list[Figure]:
    """All figures by number; none of them is imported."""
    found = []
    for path in (folder or Path(__file__).parent).glob("p*.py"):
        if match := _FILE.fullmatch(path.stem):
            found.append((int(match.group(1)), Figure(f"P{match.group(1)}", path.stem, _title(path))))
    return [figure for _, figure in sorted(found, key=lambda item: item[0])]


def chosen(all_figures: Iterable[Figure], only: Iterable[str]) -> list[Figure]:
    """Those named, in any case of letters; all if none is. Raises ValueError for a name that is not there."""
    by_name = {figure.name: figure for figure in all_figures}
    wanted = {name.upper() for name in only}
    if unknown := wanted - by_name.keys():
        raise ValueError(f"no figure {', '.join(sorted(unknown))}; there are {', '.join(by_name)}")
    return [figure for name, figure in by_name.items() if not wanted or name in wanted]


def _title(path: Path) -> str:
    """The first line of the file's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text())) or path.stem).splitlines()[0]
