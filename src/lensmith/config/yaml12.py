"""YAML as its version 1.2 reads it, with the line of every key.

PyYAML follows version 1.1, where `2e-4` is text, `no` is false, `12:30` is 750 and `010` is eight. In the 1.2 core
schema (https://yaml.org/spec/1.2.2/#103-core-schema), as in everything a person would guess, they are a number, a word,
a word and ten.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from lensmith.errors import ConfigError

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """A YAML document and where its keys stand."""

    tree: Any
    lines: Mapping[Path, int]
    """Path of a key or list item -> its line, from 1."""


class _Loader(yaml.SafeLoader):
    """Safe, with the implicit types of YAML 1.2 instead of 1.1."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own name)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text[2:] if base != 10 else text, base)


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("merge", r"<<", "<"),
):
    # Resolvers are tried in order, so `12` is an integer although it also matches the pattern of a float.
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse_yaml(text: str, where: str) -> Document:
    """Parse one document; keys become text.

    Raises:
        ConfigError: the text is not YAML, holds several documents, or a mapping has the same key twice.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return Document(None, {})
        lines: dict[Path, int] = {}
        _collect_lines(node, (), lines, where)
        return Document(_text_keys(loader.construct_document(node)), lines)
    except yaml.YAMLError as cause:
        mark = getattr(cause, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark else where
        problem = getattr(cause, "problem", None) or str(cause).splitlines()[0]
        raise ConfigError(
            f"{place}: this is not YAML: {problem}. "
            "Indent with spaces, write `name: value` with a space after the colon, and quote text that holds ': ' or '#'."
        ) from cause
    finally:
        loader.dispose()


def _collect_lines(node: yaml.Node, path: Path, lines: dict[Path, int], where: str) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = str(key.value)
            line = key.start_mark.line + 1
            if (first := lines.get((*path, name))) is not None and name != "<<":
                raise ConfigError(
                    f"{where}:{line}: '{name}' stands here and on line {first}; only one of them can hold. Remove one."
                )
            lines[(*path, name)] = line
            _collect_lines(value, (*path, name), lines, where)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            _collect_lines(item, (*path, index), lines, where)


def _text_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _text_keys(item) for key, item in value.items()}
    return [_text_keys(item) for item in value] if isinstance(value, list) else value
