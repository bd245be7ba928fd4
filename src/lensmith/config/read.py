"""YAML and `a.b=c` overrides -> RunConfig; everything wrong with them at once, in sentences with file and line.

Nothing here loads torch, so that `lensmith --help` and `lensmith config` answer at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from lensmith.config.rules import contradictions, settings_without_effect
from lensmith.config.schema import Setting, list_sections, list_settings, read_value
from lensmith.config.suggest import suggest_choice, suggest_settings
from lensmith.config.tree import RunConfig, Source
from lensmith.config.write import write_value
from lensmith.config.yaml12 import parse_yaml
from lensmith.errors import ConfigError

COMMAND_LINE = "command line"
PATHS = ("model", "data.train", "data.test", "data.image_root", "tune.start_from")
"""Settings that may name something on disk. `run` is not among them: results go under the current folder."""

Key = tuple[str | int, ...]


def read_config(source: Path | None, overrides: Sequence[str] = (), *, data: str | None = None) -> RunConfig:
    """The config of a run: defaults, under a YAML file, under `data`, under overrides such as `tune.rank=32`.

    Relative paths inside the file are looked up in the file's folder first, then in the current one; those on the
    command line in the current one. What is found becomes absolute. An override wins over the file, also where it
    takes the effect from a setting in it: `optim.steps=10` over a file with `optim.epochs` is not an error.

    Raises:
        ConfigError: all problems found, one per line: not YAML, unknown or repeated settings, wrong types,
            settings without effect, settings that contradict.
    """
    tree, places = _read_file(source) if source else ({}, {})
    from_file = _dotted(tree)
    asked = list(overrides) if data is None else [f"data.train={write_value(data)}", *overrides]
    on_command_line = {}
    for override in asked:
        key, value = _parse_override(override)
        on_command_line[".".join(key)] = value
        _put(tree, key, value)
        places[key] = COMMAND_LINE
    name = str(source) if source else COMMAND_LINE
    problems = list(_find_problems(tree, places, name))
    if problems:
        raise _sum_up(problems)
    config = RunConfig.model_validate(tree)
    problems = _find_contradictions(config, places, name)
    problems += _find_idle(config, from_file, set(_dotted(_nest(on_command_line))), places, name)
    if problems:
        raise _sum_up(problems)
    return resolve_paths(config, source.parent if source else None, places)


def _read_file(source: Path) -> tuple[dict[str, Any], dict[Key, str]]:
    try:
        text = source.read_text(encoding="utf-8")
    except FileNotFoundError as cause:
        beside = sorted(p.name for p in source.parent.glob("*.y*ml")) if source.parent.is_dir() else []
        seen = f"in its folder there is {', '.join(beside)}" if beside else "there is no YAML file in its folder"
        raise ConfigError(
            f"{source}: no such file; {seen}. `lensmith init DATA` writes a commented one to start from."
        ) from cause
    except (OSError, UnicodeDecodeError) as cause:
        raise ConfigError(f"{source}: cannot be read as UTF-8 text: {cause}. Give a YAML file of settings.") from cause
    document = parse_yaml(text, str(source))
    if not isinstance(document.tree, dict | None):
        raise ConfigError(
            f"{source}: holds {_shown(document.tree)}, but must hold settings such as `model: lensmith/tiny`. "
            "`lensmith init DATA` writes a file to start from."
        )
    tree = _without_empty_sections(document.tree or {})
    return tree, {key: f"{source}:{line}" for key, line in document.lines.items()}


def _without_empty_sections(tree: dict[str, Any], section: str = "") -> dict[str, Any]:
    """`optim:` with every line under it commented out is null to YAML and means the defaults to a person."""
    kept = {}
    for name, value in tree.items():
        path = f"{section}.{name}" if section else name
        if path in list_sections():
            if value is None:
                continue
            kept[name] = _without_empty_sections(value, path) if isinstance(value, dict) else value
        else:
            kept[name] = value
    return kept


def _parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise ConfigError(
            f"{COMMAND_LINE}: '{text}' is not a setting. "
            "Write section.name=value, such as tune.rank=32; `lensmith config` lists every setting."
        )
    return tuple(path.strip().split(".")), parse_yaml(value, f"{COMMAND_LINE}: {path}").tree


def _put(tree: dict[str, Any], key: Sequence[str], value: Any) -> None:
    *section, leaf = key
    for name in section:
        if not isinstance(tree.get(name), dict):
            tree[name] = {}
        tree = tree[name]
    if isinstance(value, dict) and isinstance(tree.get(leaf), dict):
        for name, item in value.items():
            _put(tree[leaf], [name], item)
    else:
        tree[leaf] = value


def _nest(dotted: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in dotted.items():
        _put(tree, path.split("."), value)
    return tree


def _dotted(tree: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """Dotted path -> raw value of every setting written in a tree; unknown ones too."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{section}.{name}" if section else name
        if path in list_sections() and isinstance(value, dict):
            found |= _dotted(value, path)
        else:
            found[path] = value
    return found


def _find_problems(tree: dict[str, Any], places: Mapping[Key, str], name: str) -> Iterator[str]:
    settings = {setting.path: setting for setting in list_settings()}
    wrong: dict[Key, str] = {}
    try:
        RunConfig.model_validate(tree)
    except ValidationError as caught:
        for error in caught.errors(include_url=False, include_context=False):
            key = _real_key(tree, error["loc"])
            # A union reports once per alternative; one sentence says what all of them together allow.
            wrong.setdefault(key, error["type"])
    for path, value in _dotted(tree).items():
        setting = settings.get(path)
        if setting and slips_through(setting, value):
            wrong[_key(path)] = "slipped"
    written = {key: rank for rank, key in enumerate(places)}
    for key, kind in sorted(wrong.items(), key=lambda item: written.get(item[0], len(written))):
        if any(len(other) > len(key) and other[: len(key)] == key for other in wrong):
            continue
        yield f"{_place(key, places, name)}: {_explain(tree, key, kind, settings)}"


def slips_through(setting: Setting, value: Any) -> bool:
    """What pydantic would take and nobody means: true for the number 1, and numbers that are not finite."""
    if isinstance(value, bool):
        return not setting.admits(bool)
    return isinstance(value, float) and not math.isfinite(value)


def _real_key(tree: Any, loc: Sequence[str | int]) -> Key:
    """pydantic's location without the names of union branches that it puts in between."""
    key: list[str | int] = []
    for depth, part in enumerate(loc):
        inside = part in tree if isinstance(tree, dict) else isinstance(tree, list) and part in range(len(tree))
        if inside:
            tree = _value_at(tree, (part,))
        elif depth < len(loc) - 1 or not isinstance(tree, dict):
            continue
        key.append(part)
    return tuple(key)


def _explain(tree: Any, key: Key, kind: str, settings: Mapping[str, Setting]) -> str:
    path = _written(key)
    if kind == "missing":
        return f"{path} is missing; a data file in a list is written {{path: rows.jsonl, weight: 1}}."
    value = _value_at(tree, key)
    if kind == "extra_forbidden":
        inside_list = any(isinstance(part, int) for part in key)
        near = suggest_choice(key[-1], tuple(Source.model_fields)) if inside_list else suggest_settings(path)
        return f"there is no setting {path} (set to {_shown(value)}). {near}".strip()
    if path in list_sections():
        held = ", ".join(list_sections()[path])
        return f"{path} is {_shown(value)}, but must be a section with {held}. Write them indented under it."
    in_list = key[-1] if isinstance(key[-1], int) else None
    setting = settings.get(_written(key[:-1] if in_list is not None else key))
    if setting is None or (in_list is not None and not setting.choices):
        return f"{path} is {_shown(value)}, but a data file in a list is written {{path: rows.jsonl, weight: 1}}."
    near = suggest_choice(value, setting.choices)
    allowed = f"one of {', '.join(setting.choices)}" if in_list is not None else setting.allowed
    return f"{path} is {_shown(value)}, but must be {allowed}. {near}".strip()


def _find_contradictions(config: RunConfig, places: Mapping[Key, str], name: str) -> list[str]:
    return [
        f"{_place(_key(problem.path), places, name)}: "
        f"{problem.path} is {_shown(read_value(config, problem.path))}, {problem.why}"
        for problem in contradictions(config)
    ]


def _find_idle(
    config: RunConfig, from_file: Mapping[str, Any], on_command_line: set[str], places: Mapping[Key, str], name: str
) -> list[str]:
    """Settings that somebody wrote and that do nothing.

    One from the file counts only if the file alone already makes it idle: an override may well take its effect away.
    """
    idle = settings_without_effect(config)
    try:
        idle_in_file = settings_without_effect(RunConfig.model_validate(_nest(from_file)))
    except ValidationError:  # mended by an override; then only the whole counts
        idle_in_file = idle
    guilty = [p for p in idle if p in on_command_line or (p in from_file and p in idle_in_file)]
    return [f"{_place(_key(path), places, name)}: {path} {idle[path].why}" for path in guilty]


def resolve_paths(
    config: RunConfig, folder: Path | None = None, places: Mapping[Key, str] = MappingProxyType({})
) -> RunConfig:
    """Paths that exist become absolute, so that a resumed run and `lensmith eval RUN` find them from anywhere.

    They start from `folder`, then from the current one; where `places` says that a setting came from the command line,
    from the current one only.
    """

    def resolve(value: str, key: Key) -> str:
        path = Path(value).expanduser()
        on_command_line = any(places.get(key[:depth]) == COMMAND_LINE for depth in range(1, len(key) + 1))
        roots = [Path.cwd()] if folder is None or on_command_line else [folder, Path.cwd()]
        found = next((root / path for root in roots if (root / path).exists()), None)
        return str(found.resolve()) if found else value

    # A folder that happens to be called like the embedded model does not replace it.
    defaults = {setting: read_value(RunConfig(), setting) for setting in PATHS}
    changed: dict[str, Any] = {}
    for setting in PATHS:
        key, value = _key(setting), read_value(config, setting)
        if value == defaults[setting]:
            continue
        if isinstance(value, str | Path):
            changed[setting] = resolve(str(value), key)
        elif isinstance(value, list):
            changed[setting] = [
                {**source.model_dump(), "path": resolve(source.path, (*key, index))}
                for index, source in enumerate(value)
            ]
    if ".py:" in config.eval.metric:
        file, _, function = config.eval.metric.rpartition(":")
        changed["eval.metric"] = f"{resolve(file, _key('eval.metric'))}:{function}"
    tree = config.model_dump()
    for path, value in changed.items():
        _put(tree, path.split("."), value)
    return RunConfig.model_validate(tree)


def _place(key: Key, places: Mapping[Key, str], name: str) -> str:
    """Where the setting stands, or else the nearest thing around it."""
    return next((places[key[:depth]] for depth in range(len(key), 0, -1) if key[:depth] in places), name)


def _key(path: str) -> Key:
    return tuple(path.split("."))


def _value_at(tree: Any, key: Key) -> Any:
    for part in key:
        tree = tree[part]
    return tree


def _written(key: Key) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")


def _shown(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) else write_value(value)


def _sum_up(problems: Sequence[str]) -> ConfigError:
    ending = "`lensmith config` lists every setting, what it accepts and its default."
    if len(problems) == 1:
        return ConfigError(f"{problems[0]} {ending}")
    return ConfigError("\n".join([f"{len(problems)} settings cannot be used:", *(f"  {p}" for p in problems), ending]))
