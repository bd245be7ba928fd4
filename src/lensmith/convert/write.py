"""What was converted, as a commented run.yaml and as lines for the screen."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from lensmith.config.write import plain, write_value
from lensmith.convert.nouns import TITLES, Converted, Left, Setting
from lensmith.errors import readable

COLUMNS = 110
BESIDE = 40
"""Column from which a comment stands beside its setting."""


def write_run(converted: Converted, to: str) -> str:
    """Text of the run.yaml: settings with their origin beside them, then all that has no place in it, as comments."""
    lines = [
        f"# From {converted.source}, {TITLES[converted.tool]}, by `lensmith convert`. Read it, then:  lensmith train {to}",
        "# Beside each setting stands what it was there; every other setting has its default (`lensmith config`).",
    ]
    lines += [line for remark in converted.remarks for line in _comment(f"- {remark}", "", hang="  ")]
    lines += ["", *_tree(converted)]
    matters = [one for one in converted.without if one.matters]
    if matters:
        lines += ["", "# Without counterpart:"]
        lines += [line for one in matters for line in _comment(f"- {describe_left(one)}", "", hang="  ")]
    if converted.unread:
        lines += ["", "# Not read:"]
        lines += [line for one in converted.unread for line in _comment(f"- {one.where}: {one.what}", "", hang="  ")]
    return "\n".join(lines) + "\n"


def describe_left(one: Left) -> str:
    """One argument without counterpart, in a sentence."""
    named = one.name if " = " in one.name else f"{one.name} = {one.value!r}"
    where = f" ({one.where})" if one.where else ""
    return readable(f"{named}{where}: {one.why}")


def screen(converted: Converted) -> Iterator[str]:
    """What a person should know, line by line."""
    count = len(converted.settings)
    yield f"{converted.source}: {TITLES[converted.tool]}, for {converted.task}; {count} settings have a counterpart."
    matters = [one for one in converted.without if one.matters]
    if matters:
        yield "Without counterpart:"
        yield from (f"  {describe_left(one)}" for one in matters)
    rest = [one.name for one in converted.without if not one.matters]
    if rest:
        yield f"Need nothing here: {', '.join(dict.fromkeys(rest))}."
    if converted.unread:
        yield "Not read:"
        yield from (f"  {one.where}: {readable(one.what)}" for one in converted.unread)
    yield from converted.remarks


def to_json(converted: Converted, wrote: str) -> dict[str, Any]:
    """The object of `--json`."""
    return {
        "tool": converted.tool,
        "task": converted.task,
        "settings": [
            {"path": one.path, "value": plain(one.value), "from": one.origin, "note": one.note}
            for one in converted.settings
        ],
        "without_counterpart": [
            {"name": one.name, "value": one.value, "where": one.where, "why": one.why, "matters": one.matters}
            for one in converted.without
        ],
        "not_read": [{"where": one.where, "what": one.what} for one in converted.unread],
        "remarks": list(converted.remarks),
        "wrote": wrote,
    }


def _tree(converted: Converted) -> Iterator[str]:
    open_sections: list[str] = []
    has_data = any(setting.path == "data.train" for setting in converted.settings)
    said_data = False
    for setting in converted.settings:
        *sections, leaf = setting.path.split(".")
        if not has_data and not said_data and _is_after_data(setting):
            yield from _fill_in()
            said_data, open_sections = True, ["data"] if sections[:1] == ["data"] else []
        shared = 0
        while shared < min(len(sections), len(open_sections)) and sections[shared] == open_sections[shared]:
            shared += 1
        for depth in range(shared, len(sections)):
            if depth == 0:
                yield ""
            yield "  " * depth + f"{sections[depth]}:"
        if open_sections and not sections:
            yield ""
        open_sections = sections
        yield from _line(setting, leaf, "  " * len(sections))
    if not has_data and not said_data:
        yield from _fill_in()


def _is_after_data(setting: Setting) -> bool:
    return setting.path not in ("model", "task")


def _fill_in() -> Iterator[str]:
    """Where the data would stand, if the file named any."""
    yield ""
    yield "data:"
    yield from [
        "  # train: rows.jsonl   <- fill in: a file, a folder or a data set name; docs/data.md shows the shapes"
    ]


def _line(setting: Setting, leaf: str, indent: str) -> Iterator[str]:
    yield from _comment(setting.note, indent)
    text = f"{indent}{leaf}: {write_value(setting.value)}"
    if not setting.origin:
        yield text
    elif len(text) + len(setting.origin) > COLUMNS:
        yield from _comment(setting.origin, indent)
        yield text
    else:
        yield f"{text.ljust(BESIDE)}  # {' '.join(setting.origin.split())}"


def _comment(text: str, indent: str, hang: str = "") -> list[str]:
    start = f"{indent}# "
    words = " ".join(readable(text).split())
    return textwrap.wrap(words, COLUMNS, initial_indent=start, subsequent_indent=start + hang, break_long_words=False)
