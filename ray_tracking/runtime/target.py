"""The training function a user names: `module:function` or `path/file.py:function`,
found and checked before Ray starts.

In: the text. Out: a `LoadedTarget`, or a UsageError that says what is wrong with it.
Imports the user's code, and ray only to ship it.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ray_tracking.errors import UsageError

_FORMS = "Name it as module:function, or as path/file.py:function."


@dataclass(frozen=True, slots=True)
class LoadedTarget:
    """A training function that can be called with one argument.

    `name` is the target as the user gave it; `source` the file it was loaded from (None for a module
    without one);
    `digest` is `sha256:<hex>` of that file's bytes, "" without a file.
    `by_path` says that `module` is known under a
    made-up name in this process only, so that another process needs it by value.
    """

    function: Callable[[Any], Any]
    name: str
    source: Path | None
    digest: str
    module: ModuleType
    by_path: bool


def load_target(target: str) -> LoadedTarget:
    """Load and check TARGET. Raises UsageError: no such file, module or function, not callable,
    wrong arguments,
    or the user's own error while importing, with the line of their file."""
    place, function_name, by_path = split_target(target)
    source = _existing_file(place, target) if by_path else _module_source(place, target)
    digest = ""
    if source is not None:
        code = source.read_bytes()
        digest = f"sha256:{hashlib.sha256(code).hexdigest()}"
        _check_source(code, source, function_name)
    module = _import_file(source) if by_path and source is not None else _import_module(place, source)
    function = _function(module, function_name, place)
    return LoadedTarget(function, target, source, digest, module, by_path)


def split_target(target: str) -> tuple[str, str, bool]:
    """Module or file, function, and whether the first is a file. Raises UsageError if it has neither form."""
    place, colon, function_name = target.rpartition(":")
    if not colon or not place or not function_name:
        raise UsageError(f"The target {target!r} does not say which function to run.", hint=_form_hint(target))
    if not function_name.isidentifier():
        raise UsageError(f"{function_name!r} in the target {target!r} is no function's name.", hint=_FORMS)
    return place, function_name, place.endswith(".py") or "/" in place or os.sep in place


def find_target(target: str) -> Path | None:
    """The file of TARGET, looked into but not run, for another machine to load. Raises UsageError as `load_target`.

    None: a module that is not below the working directory, and so must be installed there.
    """
    place, function_name, by_path = split_target(target)
    source = _existing_file(place, target) if by_path else _module_here(place, target)
    if source is not None:
        _check_source(source.read_bytes(), source, function_name)
    return source


def _module_here(place: str, target: str) -> Path | None:
    parts = place.split(".")
    if not all(part.isidentifier() for part in parts):
        raise UsageError(f"{place!r} in the target {target!r} is neither a module's name nor a file.", hint=_FORMS)
    file = Path.cwd().joinpath(*parts)
    for candidate in (file.with_suffix(".py"), file / "__init__.py"):
        if candidate.is_file():
            return candidate.resolve()
    top = Path(parts[0])
    if top.is_dir() or top.with_suffix(".py").is_file():
        raise UsageError(f"There is no module {place!r} in {Path.cwd()}.", hint="Check the spelling, or name the file.")
    return None


def ship_by_value(loaded: LoadedTarget) -> None:
    """Let Ray send a target that was given as a file, and the modules it imports from its folder, whole to the workers.

    They can't import it themselves: they have neither its made-up name nor its folder on their path.
    A target given as a module is left alone: it is found by name, also on the workers.
    """
    if not loaded.by_path or loaded.source is None:
        return
    from ray import cloudpickle

    for module in _own_modules(loaded.source.parent):
        cloudpickle.register_pickle_by_value(module)


def _own_modules(folder: Path) -> list[ModuleType]:
    """The modules loaded from a folder that no environment and no package of ours holds."""
    found = []
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not isinstance(module, ModuleType) or not file or name.partition(".")[0] == "ray_tracking":
            continue
        path = Path(file)
        installed = path.is_relative_to(sys.prefix) or path.is_relative_to(sys.base_prefix)
        if path.is_relative_to(folder) and not installed and "site-packages" not in path.parts:
            found.append(module)
    return found


def _form_hint(target: str) -> str:
    if target.endswith(".py") and Path(target).is_file():
        names = _defined(Path(target).read_bytes())
        return f"Write {target}:{names[0] if names else 'train'}."
    return _FORMS


def _existing_file(place: str, target: str) -> Path:
    path = Path(place).expanduser()
    if path.is_file():
        return path.resolve()
    if path.is_dir():
        raise UsageError(f"{place} in the target {target!r} is a folder.", hint=_FORMS)
    try:
        beside = [entry.name for entry in path.parent.iterdir() if entry.suffix == ".py"]
    except OSError:
        raise UsageError(
            f"There is no folder {path.parent}, so no file for the target {target!r}.", hint=_FORMS
        ) from None
    raise UsageError(
        f"There is no file {place} (looked in {Path.cwd()}).",
        hint=_nearest(path.name, beside, "Python files there"),
    )


def _module_source(place: str, target: str) -> Path | None:
    """The file of a module that can be imported from here; parents of a dotted name are imported to look."""
    if not all(part.isidentifier() for part in place.split(".")):
        raise UsageError(f"{place!r} in the target {target!r} is neither a module's name nor a file.", hint=_FORMS)
    _search_first(os.getcwd())
    importlib.invalidate_caches()
    try:
        spec = importlib.util.find_spec(place)
    except ModuleNotFoundError as error:
        if error.name is None or not (place == error.name or place.startswith(f"{error.name}.")):
            raise _import_failure(error, None, place) from error
        spec = None
    except (Exception, SystemExit) as error:
        # whatever the user's package raises while it is imported is theirs, and is shown to them
        raise _import_failure(error, None, place) from error
    if spec is None:
        as_file = Path(*place.split(".")).with_suffix(".py")
        raise UsageError(
            f"There is no module {place!r} (looked in {os.getcwd()} and the installed packages).",
            hint="Check the spelling and the virtual environment, or name the file: "
            f"{as_file}:{target.rpartition(':')[2]}.",
        )
    return Path(spec.origin).resolve() if spec.has_location and spec.origin and spec.origin.endswith(".py") else None


def _check_source(code: bytes, source: Path, function_name: str) -> None:
    """Refuse a broken file, or one that can't define the function, without running it:
    importing torch takes seconds."""
    try:
        tree = ast.parse(code, str(source))
    except SyntaxError as error:
        line = (error.text or "").strip()
        raise UsageError(
            f"{source}, line {error.lineno}: {error.msg}" + (f"\n    {line}" if line else ""),
            hint="Python can't read the file; correct this line.",
        ) from error
    except ValueError as error:  # NUL bytes
        raise UsageError(f"{source} is no Python source: {error}", hint=_FORMS) from error
    bound = set(_bound_names(tree))
    if function_name not in bound and not bound & {"*", "__getattr__", "globals"}:
        raise _no_function(function_name, str(source), _defined(code))


def _bound_names(tree: ast.AST) -> list[str]:
    """Every name that is bound anywhere in the source, and those by which names may appear unseen."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, ast.Name) and (isinstance(node.ctx, ast.Store) or node.id in ("globals", "exec")):
            names.append("globals" if node.id == "exec" else node.id)
        elif isinstance(node, ast.alias):
            names.append(node.asname or node.name.partition(".")[0])
    return names


def _defined(code: bytes) -> list[str]:
    """The functions at the top of a source file."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return []
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]


def _import_file(source: Path) -> ModuleType:
    # A name of its own, so that a user's `random.py` or two files named `train.py` don't meet in sys.modules.
    name = f"_ray_tracking_target_{source.stem}_{hashlib.sha256(str(source).encode()).hexdigest()[:8]}"
    name = "".join(char if char.isalnum() else "_" for char in name)
    _search_first(str(source.parent))
    spec = importlib.util.spec_from_file_location(name, source)
    if spec is None or spec.loader is None:
        raise UsageError(f"{source} can't be loaded as a Python module.", hint=_FORMS)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        # whatever the user's file raises while it is imported is theirs, and is shown to them
        del sys.modules[name]
        raise _import_failure(error, source, source.name) from error
    return module


def _import_module(place: str, source: Path | None) -> ModuleType:
    try:
        return importlib.import_module(place)
    except (Exception, SystemExit) as error:
        # whatever the user's module raises while it is imported is theirs, and is shown to them
        raise _import_failure(error, source, place) from error


def _search_first(folder: str) -> None:
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _import_failure(error: BaseException, source: Path | None, place: str) -> UsageError:
    """What went wrong while importing the user's code, and where in it."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and "importlib" not in frame.filename
    ]
    own = [frame for frame in frames if source is not None and frame.filename == str(source)] or frames
    where = f"{own[-1].filename}, line {own[-1].lineno}: {own[-1].line}" if own else place
    if isinstance(error, SyntaxError):
        where = f"{error.filename}, line {error.lineno}: {(error.text or '').strip()}"
    hint = None
    if isinstance(error, ModuleNotFoundError):
        hint = f"Install {error.name!r} in this environment ({sys.prefix}), or put its file beside the target's."
    elif isinstance(error, SystemExit):
        hint = "The file ends the program when imported: put what it runs under `if __name__ == '__main__':`."
    said = str(error) or "no message"
    return UsageError(f"{place} can't be imported: {type(error).__name__}: {said}\n  at {where}", hint=hint)


def _function(module: ModuleType, name: str, place: str) -> Callable[[Any], Any]:
    if not hasattr(module, name):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise _no_function(name, place, known)
    function = getattr(module, name)
    if not callable(function):
        raise UsageError(
            f"{name!r} in {place} is of type {type(function).__name__}, not a function.",
            hint=f"Define it as `def {name}(run): ...`.",
        )
    if inspect.isclass(function) or inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        what = (
            "a class"
            if inspect.isclass(function)
            else "async"
            if inspect.iscoroutinefunction(function)
            else "a generator"
        )
        raise UsageError(
            f"{name!r} in {place} is {what}, not a plain function.",
            hint=f"Define it as `def {name}(run): ...`.",
        )
    _check_signature(function, name, place)
    return function  # type: ignore[no-any-return]


def _check_signature(function: Callable[..., Any], name: str, place: str) -> None:
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # a builtin without one
        return
    try:
        signature.bind(object())
    except TypeError as error:
        raise UsageError(
            f"{name}{signature} in {place} can't be called with one positional argument: {error}.",
            hint=f"It is called as {name}(run): give it one parameter `run`, others with defaults.",
        ) from None


def _no_function(name: str, place: str, known: list[str]) -> UsageError:
    return UsageError(f"There is no function {name!r} in {place}.", hint=_nearest(name, known, "Functions there"))


def _nearest(name: str, known: list[str], what: str) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return f"{what}: {', '.join(sorted(known)[:10])}." if known else f"{what}: none."
