"""From a file of another tool to what became of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from lensmith.convert.command import is_command, read_command
from lensmith.convert.llamafactory import llamafactory_table
from lensmith.convert.nouns import Converted, Found, Table, Task, Tool
from lensmith.convert.python_file import read_python
from lensmith.convert.settings_file import read_settings_file, with_calls
from lensmith.convert.settle import settle
from lensmith.convert.swift import swift_table
from lensmith.convert.trl import trl_table
from lensmith.convert.unsloth import unsloth_table
from lensmith.errors import ConfigError

TABLES: Mapping[Tool, Callable[[Task], Table]] = {
    "unsloth": unsloth_table,
    "trl": trl_table,
    "llama-factory": llamafactory_table,
    "ms-swift": swift_table,
}
MOST_BYTES = 32 * 2**20
"""A notebook with its pictures is smaller; a data file given by mistake may not be."""


def convert_file(path: Path, tool: Tool | None = None) -> Converted:
    """Read a script, notebook, settings file or command line, and settle each of its arguments.

    Raises:
        ConfigError: no such file, nothing of the four tools in it, or training of a kind that Lensmith has not.
    """
    text = _read_text(path)
    found = _found(path, text, tool)
    if tool is not None and found.tool != tool:
        found = replace(found, tool=tool)
    if not found.arguments:
        raise ConfigError(
            f"{path}: no arguments in it that a setting could come from. `lensmith init DATA` starts anew."
        )
    if found.tool == "trl" and path.suffix not in (".py", ".ipynb"):
        found = with_calls(found)
    return settle(found, TABLES[found.tool](found.task), path.name)


def _found(path: Path, text: str, tool: Tool | None) -> Found:
    if path.suffix in (".py", ".ipynb"):
        try:
            return read_python(path, text)
        except RecursionError as cause:
            raise ConfigError(f"{path}: an expression in it is nested too deeply to be read. Shorten it.") from cause
    if path.suffix in (".yaml", ".yml", ".json"):
        return read_settings_file(path, text, tool)
    if is_command(text) or path.suffix in (".sh", ".bash", ".txt"):
        return read_command(path, text)
    raise ConfigError(
        f"{path}: a file ending in '{path.suffix}' is none that is known. Give an Unsloth or TRL script (.py, .ipynb), "
        "LLaMA-Factory's .yaml or .json, or a shell script (.sh) with `swift sft`, `swift rlhf`, `trl sft` or `trl grpo`."
    )


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ConfigError(
                f"{path}: {path.stat().st_size / 2**20:,.0f} MiB, which no script is. Give the script that trains."
            )
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as cause:
        raise ConfigError(f"{path}: no such file. Check the path.") from cause
    except (OSError, UnicodeDecodeError) as cause:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {cause}. Give the script or the settings.") from cause
