"""Building a model from configuration: a class by name, its arguments, weights from a checkpoint, a
device.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ray_tracking.checkpoint.fitting import fit_module
from ray_tracking.checkpoint.keys import Keyring
from ray_tracking.checkpoint.loaded import ModelCheckpoint
from ray_tracking.checkpoint.manager import open_store
from ray_tracking.checkpoint.manifest import model_file, parse_step_folder, plain_name
from ray_tracking.checkpoint.mapping import NotThatFileError, open_bytes
from ray_tracking.checkpoint.store import CheckpointStore
from ray_tracking.checkpoint.strategy import CheckpointStrategy, as_mapping
from ray_tracking.checkpoint.tensor_views import TensorFile, private_copies
from ray_tracking.errors import CheckpointCorruptError, CheckpointError, ConfigError
from ray_tracking.storage import Storage

_KEYS = ("name", "args", "weights", "device", "checkpoint_dir", "monitor", "mode")
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".tar")


def create_model(config: Any, *, keyring: Keyring | None = None) -> torch.nn.Module:
    """The model of `config["model"]`, on its device.

    `name`: "package.module.Class" or "path/to/file.py:Class"; `args`: keyword arguments; `device`: auto, cpu, cuda:0;
    `weights`: null, "latest", "best" (by `monitor`, `mode`), a step, a checkpoint's folder or a .safetensors file,
    where the first three look in `checkpoint_dir` (the default one of `create_checkpoint_manager` if null).
    `keyring` opens encrypted checkpoints.
    Raises ConfigError for what is configured wrongly, CheckpointError for weights that are not there or do not fit,
    CheckpointCorruptError for those that are not what was saved, WrongKeyError.
    """
    section: dict[str, Any] = {"name": config} if isinstance(config, str) else dict(as_mapping(config))
    for key in section:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            raise ConfigError(
                f"model: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "."),
                hint=f"Allowed: {', '.join(_KEYS)}.",
            )
    name = section.get("name")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"model.name: found {name!r}; allowed: 'package.module.Class' or 'path/to/file.py:Class'.")
    device = _device(section.get("device") or "auto")
    model = _build(_find(name), name, section.get("args") or {})
    weights = section.get("weights")
    if weights is not None:
        loaded = load_weights(weights, section, keyring)
        where = f"The weights {weights!r} ({loaded.path}) for {name}"
        model.load_state_dict(fit_module(model, loaded.model_state, where))
    return model.to(device)


def load_weights(weights: str | int, section: Mapping[str, Any], keyring: Keyring | None = None) -> ModelCheckpoint:
    """The weights that `weights` names (see `create_model`). Never reads a pickle."""
    if isinstance(weights, int) and not isinstance(weights, bool):
        return _from_store(weights, section, keyring)
    if not isinstance(weights, (str, os.PathLike)):
        raise ConfigError(f"model.weights: found {weights!r}; allowed: null, latest, best, a step or a path.")
    text = os.fspath(weights)
    if text in ("latest", "best"):
        return _from_store(text, section, keyring)
    if text.isdecimal():
        return _from_store(int(text), section, keyring)
    parent, leaf = _split(text)
    if leaf.endswith(_PICKLES):
        raise ConfigError(
            f"model.weights: {text!r} looks like a pickle, which can run code when it is loaded; it was not opened.",
            hint="Convert it to .safetensors (safetensors.torch.save_file) and give that.",
        )
    if plain_name(leaf).endswith(".safetensors"):
        return _from_file(parent, leaf, text, keyring)
    store = CheckpointStore(Storage.open(parent), keyring=keyring)
    found = store.inspect(leaf)
    if found.info is None:
        raise CheckpointError(
            f"model.weights: {text!r} is not a complete checkpoint: {found.reason}.",
            hint="Give a checkpoint's folder (.../step-000120), a .safetensors file, latest, best or a step.",
        )
    return store.load_model(found.info)


def _split(path: str) -> tuple[str, str]:
    """(folder, last part) of a path or URI."""
    parent, _, leaf = path.rstrip("/").rpartition("/")
    return parent or ("/" if path.startswith("/") else "."), leaf


def _from_store(which: str | int, section: Mapping[str, Any], keyring: Keyring | None) -> ModelCheckpoint:
    store = open_store(section.get("checkpoint_dir"), keyring)
    infos = store.checkpoints()
    if which == "latest":
        info = store.latest_valid()
    elif which == "best":
        rules = {key: section[key] for key in ("monitor", "mode") if section.get(key)}
        strategy = CheckpointStrategy(**rules)
        info = strategy.best(infos)
        if info is None and infos:
            known = sorted({key for each in infos for key in each.metrics})
            raise CheckpointError(
                f"model.weights: best: no checkpoint in {store.storage.uri} has a finite {strategy.monitor!r}.",
                hint=f"Set model.monitor to one of: {', '.join(known) or 'none was saved'}.",
            )
    else:
        info = next((each for each in infos if each.step == which), None)
    if info is None:
        steps = ", ".join(str(each.step) for each in infos[-10:])
        raise CheckpointError(
            f"model.weights: {which!r} is not in {store.storage.uri}; complete checkpoints there: {steps or 'none'}.",
            hint="Set model.checkpoint_dir to the folder of a run or of checkpoints, or model.weights to null.",
        )
    return store.load_model(info)


def _from_file(parent: str, leaf: str, shown: str, keyring: Keyring | None) -> ModelCheckpoint:
    """A single file. One that belongs to a complete checkpoint is read as such: verified, and with its other parts."""
    above, folder = _split(parent)
    if leaf.startswith("model") and parse_step_folder(folder) is not None:
        store = CheckpointStore(Storage.open(above), keyring=keyring)
        info = store.inspect(folder).info
        if info is not None and any(leaf in manifest.files for manifest in info.manifests):
            return store.load_model(info)
    if plain_name(leaf) != leaf:
        raise CheckpointError(
            f"model.weights: {shown!r} is compressed or encrypted and lies in no complete checkpoint.",
            hint="Give a checkpoint's folder (.../step-000120).",
        )
    try:
        with open_bytes(Storage.open(parent), leaf, None, follow_links=True) as memory:
            file = TensorFile(memory.view)
            copies = dict(zip(file.spans, private_copies(map(file.view, file.spans)), strict=True))
            tied = {name: copies[kept] for name, kept in file.tied.items()}
            del file
    except FileNotFoundError as error:
        hint = f"A checkpoint's weights are in its {model_file(0, 1)}, or in several files: give its folder."
        raise CheckpointError(f"model.weights: there is no file {shown!r}.", hint=hint) from error
    except NotThatFileError as error:
        raise CheckpointCorruptError(f"{shown} can't be read: {error}") from error
    except ValueError as error:
        raise CheckpointCorruptError(f"{shown} is {error}") from error
    return ModelCheckpoint({**copies, **tied}, path=shown)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"model.device: found {name!r}; allowed: auto, cpu, cuda, cuda:0 and so on.") from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(
            f"model.device: {name!r} is not here: this machine shows {count} CUDA devices.",
            hint="Use auto or cpu.",
        )
    return device


def _find(name: str) -> Callable[..., Any]:
    path, colon, attribute = name.rpartition(":")
    if colon:
        return _attribute(_load_file(path, name), attribute, name)
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:cut])
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
                continue
            raise ConfigError(f"model.name: {name!r}: {module_name} can't be imported: {error}") from error
        return _attribute(module, ".".join(parts[cut:]), name)
    near = difflib.get_close_matches(parts[0], sys.modules, n=1)
    raise ConfigError(
        f"model.name: {name!r}: there is no module {parts[0]!r} that can be imported"
        + (f"; did you mean {near[0]!r}?" if near else "."),
        hint="Use 'package.module.Class' of an installed package, or 'path/to/file.py:Class'.",
    )


def _load_file(path: str, name: str) -> ModuleType:
    file = Path(path).expanduser().resolve()
    if file.suffix != ".py" or not file.is_file():
        raise ConfigError(f"model.name: {name!r}: there is no Python file {str(file)!r}.")
    module_name = f"_ray_tracking_model_{file.stem}_{abs(hash(str(file))):x}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"model.name: {name!r}: {str(file)!r} can't be loaded as a module.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and typing look a class's module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's file may raise anything
        del sys.modules[module_name]
        raise ConfigError(f"model.name: {name!r}: running {file.name} failed: {error!r}") from error
    return module


def _attribute(module: ModuleType, path: str, name: str) -> Callable[..., Any]:
    found: Any = module
    for part in path.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=1)
            raise ConfigError(
                f"model.name: {name!r}: {getattr(found, '__name__', found)} has no {part!r}"
                + (f"; did you mean {near[0]!r}?" if near else ".")
            )
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"model.name: {name!r} is a {type(found).__name__}; it must be a class or function.")
    return found  # type: ignore[no-any-return]


def _build(factory: Callable[..., Any], name: str, args: Mapping[str, Any]) -> torch.nn.Module:
    try:
        signature = inspect.signature(factory)
    except (ValueError, TypeError):
        signature = None  # a class written in C may have none: calling it will tell
    if signature is not None:
        try:
            signature.bind(**args)
        except TypeError as error:
            raise ConfigError(
                f"model.args for {name}: {error}; found: {', '.join(args) or 'no arguments'}.",
                hint=f"Allowed: {name.rpartition('.')[2].rpartition(':')[2]}{signature}",
            ) from error
    try:
        model = factory(**args)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ConfigError(f"model: {name}({dict(args)}) failed: {error}", hint="Check model.args.") from error
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"model.name: {name!r} made a {type(model).__name__}; it must make a torch.nn.Module.")
    return model
