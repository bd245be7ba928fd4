"""A config as commented YAML, and how it differs from the defaults.

The YAML is for people and for `read_config`: settings without effect stand in it as comments, so that reading it back
gives the same run and complains of nothing.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from lensmith.config.rules import settings_without_effect
from lensmith.config.schema import list_settings, read_value
from lensmith.config.tree import RunConfig

COMMENT_COLUMNS = 100
PLAIN_TEXT = re.compile(r"[A-Za-z/][\w./@+-]*")
"""Text that every YAML reads as text without quotes, except the words below."""
YAML_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}


def dump_config(config: RunConfig) -> str:
    """The whole resolved tree as YAML, each setting under its meaning; `read_config` reads it back to the same run."""
    idle = settings_without_effect(config)
    lines = {setting.path: read_value(config, setting.path) for setting in list_settings()}
    return render_yaml(lines, commented_out={path: idle[path].why for path in lines if path in idle})


def effective_settings(config: RunConfig) -> dict[str, Any]:
    """Dotted path -> plain value, without the settings that have no effect in this config."""
    idle = settings_without_effect(config)
    return {s.path: plain(read_value(config, s.path)) for s in list_settings() if s.path not in idle}


def config_diff(config: RunConfig, base: RunConfig | None = None) -> dict[str, Any]:
    """Dotted path -> plain value, for the settings with effect that differ from `base` (the defaults if None)."""
    base = RunConfig() if base is None else base
    now = effective_settings(config)
    return {path: value for path, value in now.items() if plain(read_value(base, path)) != value}


def render_yaml(
    values: Mapping[str, Any], *, commented_out: Mapping[str, str] | None = None, notes: Mapping[str, str] | None = None
) -> str:
    """Dotted paths and values as nested YAML with each setting's meaning above it.

    `commented_out` maps paths to the reason why their line is only a comment; `notes` adds a sentence to a meaning.
    """
    commented_out, notes = commented_out or {}, notes or {}
    docs = {setting.path: setting.doc for setting in list_settings()}
    lines: list[str] = []
    open_section: list[str] = []
    for path, value in values.items():
        *section, leaf = path.split(".")
        shared = next((i for i, (a, b) in enumerate(zip(section, open_section, strict=False)) if a != b), None)
        shared = min(len(section), len(open_section)) if shared is None else shared
        for depth in range(shared, len(section)):
            if depth == 0:
                lines.append("")
            lines.append("  " * depth + f"{section[depth]}:")
        open_section = section
        indent = "  " * len(section)
        meaning = " ".join(filter(None, [docs[path], notes.get(path)]))
        prefix = f"{indent}# "
        lines += textwrap.wrap(meaning, COMMENT_COLUMNS, initial_indent=prefix, subsequent_indent=prefix)
        if path in commented_out:
            lines.append(f"{indent}# {leaf}: {write_value(value)}  ({commented_out[path].split('. ')[0]})")
        else:
            lines.append(f"{indent}{leaf}: {write_value(value)}")
    return "\n".join(_fill_empty_sections(lines)).strip() + "\n"


def plain(value: Any) -> Any:
    """A setting's value as JSON has it."""
    if isinstance(value, BaseModel):
        return {name: plain(item) for name, item in value}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def write_value(value: Any) -> str:
    """One value on one line, read alike by YAML 1.1 and 1.2."""
    value = plain(value)
    if isinstance(value, str):
        is_plain = PLAIN_TEXT.fullmatch(value) and value.lower() not in YAML_WORDS
        return value if is_plain else json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        text = repr(value)
        # YAML 1.1 takes `1e-05` for text and needs the point.
        return text.replace("e", ".0e") if "e" in text and "." not in text else text
    if isinstance(value, list):
        return "[" + ", ".join(write_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {write_value(item)}" for name, item in value.items()) + "}"
    return json.dumps(value)


def _fill_empty_sections(lines: Sequence[str]) -> list[str]:
    """Top-level settings after a section get a blank line before their comment, so that nobody reads them as inside."""
    spaced: list[str] = []
    for line in lines:
        inside = bool(spaced) and spaced[-1].startswith(" ")
        if inside and line and not line.startswith(" "):
            spaced.append("")
        spaced.append(line)
    return spaced
