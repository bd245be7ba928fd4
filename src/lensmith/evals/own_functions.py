"""Functions of a user's own by `file.py:name`, for rewards and metrics: the file is run, as any Python file that one starts."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from lensmith.config.suggest import suggest_choice
from lensmith.errors import ConfigError


def find_function(
    name: str, *, root: Path, place: str, example: str, modules: dict[Path, ModuleType] | None = None
) -> Callable[..., Any]:
    """The function that `file.py:name` names.

    Args:
        root: folder that the file's path starts from.
        place: the setting, which every message starts with.
        example: how such a name is written.
        modules: files that were run already; this one is added, so that two functions of one file share its state.

    Raises:
        ConfigError: there is no such file or function, or the file cannot be run.
    """
    modules = {} if modules is None else modules
    file, _, attribute = name.rpartition(":")
    path = (root / Path(file).expanduser()).resolve()
    if path.suffix != ".py" or not path.is_file():
        raise ConfigError(
            f"{place}: {name!r} names the file {path}, which is no Python file that exists. "
            f"Write it as {example}, starting from {root}."
        )
    if path not in modules:
        modules[path] = _run_file(path, place)
    found = getattr(modules[path], attribute, None)
    if not callable(found):
        held = [one for one, value in vars(modules[path]).items() if inspect.isfunction(value) and one[0] != "_"]
        raise ConfigError(
            f"{place}: {path.name} has no function {attribute!r}; it has {', '.join(held) or 'none'}. "
            f"{suggest_choice(attribute, held)}".strip()
        )
    return found


def _run_file(path: Path, place: str) -> ModuleType:
    # Two files of one name in different folders are two modules.
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    source = importlib.util.spec_from_file_location(name, path)
    if source is None or source.loader is None:
        raise ConfigError(f"{place}: Python has no loader for {path}, only for .py files. Rename it.")
    module = importlib.util.module_from_spec(source)
    sys.modules[name] = module  # dataclasses and pickle look a function's module up by its name
    try:
        source.loader.exec_module(module)
    except Exception as cause:
        del sys.modules[name]
        raise ConfigError(
            f"{place}: {path} cannot be run: {type(cause).__name__}: {cause}. See what is wrong with: python {path.name}"
        ) from cause
    return module
