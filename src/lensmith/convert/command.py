"""Command lines: `swift sft --model ...`, `trl grpo --...`, `llamafactory-cli train --...`, alone or in a shell script.

Words are split as a shell would; nothing runs. A variable that the script sets once to plain text is filled in.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lensmith.config.yaml12 import parse_yaml
from lensmith.convert.nouns import Argument, Found, Task, Tool, Unread
from lensmith.errors import ConfigError

ASSIGNED = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)=(.*)", re.DOTALL)
VARIABLE = re.compile(r"\$\{(\w+)\}|\$(\w+)")
ENDS = {";", "&&", "||", "|", "&", ">", ">>", "2>&1", "2>", "&>"}
COMMANDS: Mapping[tuple[str, str], tuple[Tool, Task]] = {
    ("swift", "sft"): ("ms-swift", "sft"),
    ("swift", "pt"): ("ms-swift", "sft"),
    ("swift", "rlhf"): ("ms-swift", "grpo"),
    ("trl", "sft"): ("trl", "sft"),
    ("trl", "grpo"): ("trl", "grpo"),
    ("llamafactory-cli", "train"): ("llama-factory", "sft"),
}
LISTS = ("dataset", "val_dataset", "target_modules", "reward_funcs", "reward_weights", "adapters", "report_to")
"""What stays a list where one value is given, because the tables ask for its members; ms-swift's nargs."""


def read_command(path: Path, text: str) -> Found:
    """What the first training command of a text says.

    Raises:
        ConfigError: there is none, or it trains in a way that Lensmith has not.
    """
    lines = list(_logical_lines(text))
    variables, unread = _variables(lines), []
    starts = [(number, words, at) for number, words in lines if (at := _command_at(words)) is not None]
    if not starts:
        known = ", ".join(" ".join(one) for one in COMMANDS)
        raise ConfigError(f"{path}: no training command in it; those that are understood: {known}.")
    number, words, at = starts[0]
    tool, task = COMMANDS[_name(words, at)]
    unread += [Unread(f"line {other}", "a second training command; the first is used") for other, *_ in starts[1:]]
    arguments = []
    if tool == "ms-swift":
        arguments += _environment(lines, number, words[:at], variables)
    options = list(_options(words[at + 2 :]))
    if tool == "llama-factory" and not options:
        given = next(iter(words[at + 2 :]), "FILE.yaml")
        raise ConfigError(f"{path}: the settings are in {given}. Convert that: lensmith convert {given}")
    for name, values in options:
        where = f"line {_line_of(text, name, number)}"
        argument = _argument(name, values, where, variables, unread)
        if argument is not None:
            arguments.append(argument)
    return Found(tool, _task(path, tool, task, arguments), tuple(arguments), tuple(unread))


def is_command(text: str) -> bool:
    """Whether a text holds one of the known commands."""
    try:
        return any(_command_at(words) is not None for _, words in _logical_lines(text))
    except ConfigError:
        return False


def _task(path: Path, tool: Tool, task: Task, arguments: Sequence[Argument]) -> Task:
    if tool == "ms-swift" and task == "grpo":
        kind = next((one.value for one in arguments if one.name == "rlhf_type"), "dpo")
        if kind != "grpo":
            raise ConfigError(f"{path}: trains with rlhf_type={kind}; of `swift rlhf` Lensmith has grpo alone.")
    return task


def _logical_lines(text: str) -> Iterator[tuple[int, list[str]]]:
    """Number of the first physical line, and the words of each line after joining those that end in a backslash."""
    pending, start = "", 1
    for number, line in enumerate(text.splitlines(), 1):
        if not pending:
            start = number
        # A comment between continued lines ends nothing here, although a shell would stop: it is how people write them.
        if pending and line.lstrip().startswith("#"):
            continue
        if line.rstrip().endswith("\\"):
            pending += line.rstrip()[:-1] + " "
            continue
        yield start, _split(pending + line)
        pending = ""
    if pending:
        yield start, _split(pending)


def _split(line: str) -> list[str]:
    try:
        return shlex.split(line.removeprefix("$ ").removeprefix("!"), comments=True)
    except ValueError:
        return line.split()  # a quote that does not close on this line


def _name(words: Sequence[str], at: int) -> tuple[str, str]:
    return Path(words[at]).name, words[at + 1]


def _command_at(words: Sequence[str]) -> int | None:
    return next((at for at in range(len(words) - 1) if _name(words, at) in COMMANDS), None)


def _variables(lines: Sequence[tuple[int, Sequence[str]]]) -> dict[str, str | None]:
    """Name -> text; None where it is set more than once, or by a command."""
    found: dict[str, str | None] = {}
    for _, words in lines:
        for word in words[1:] if words[:1] == ["export"] else words:
            match = ASSIGNED.fullmatch(word)
            if not match:
                break
            name, value = match.groups()
            clean = "$" not in value and "`" not in value
            found[name] = value if clean and found.get(name, value) == value else None
    return found


def _environment(
    lines: Sequence[tuple[int, Sequence[str]]], number: int, before: Sequence[str], variables: Mapping[str, str | None]
) -> Iterator[Argument]:
    exported = [word for line, words in lines if line < number and words[:1] == ["export"] for word in words[1:]]
    for word in [*exported, *before]:
        match = ASSIGNED.fullmatch(word)
        if match and (value := variables.get(match[1])) is not None and match[1].isupper():
            yield Argument(f"env.{match[1]}", _plain(value), f"line {number}", match[1])


def _options(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    name, values = "", []
    for word in words:
        if word in ENDS:
            break
        if re.match(r"--?[A-Za-z]", word):
            if name:
                yield name, values
            name, _, value = word.lstrip("-").partition("=")
            name, values = name.replace("-", "_"), [value] if value else []
        else:
            values.append(word)
    if name:
        yield name, values


def _argument(
    name: str, values: Sequence[str], where: str, variables: Mapping[str, str | None], unread: list[Unread]
) -> Argument | None:
    filled = [_fill(value, variables) for value in values]
    if None in filled:
        unread.append(Unread(where, f"{name} = {' '.join(values)} is set by the shell", name))
        return None
    plain = [_plain(value) for value in filled if value is not None]
    if not plain:
        return Argument(name, True, where)
    return Argument(name, plain if len(plain) > 1 or name in LISTS else plain[0], where)


def _fill(value: str, variables: Mapping[str, str | None]) -> str | None:
    if "`" in value or "$(" in value:
        return None
    names = [one or other for one, other in VARIABLE.findall(value)]
    if any(variables.get(name) is None for name in names):
        return None
    return VARIABLE.sub(lambda match: str(variables[match[1] or match[2]]), value)


def _plain(text: str) -> Any:
    """A number, true or false where it is one; else the text."""
    if re.fullmatch(r"[\w.+-]+", text):
        value = parse_yaml(text, "command line").tree
        return value if isinstance(value, bool | int | float) else text
    return text


def _line_of(text: str, name: str, start: int) -> int:
    written = re.compile(rf"--?{re.escape(name).replace('_', '[_-]')}(?![\w-])")
    found = (number for number, line in enumerate(text.splitlines(), 1) if number >= start and written.search(line))
    return next(found, start)
