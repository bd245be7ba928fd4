"""Arguments that were found, through a tool's table, to our settings and to what has none."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from lensmith.config.read import slips_through
from lensmith.config.rules import contradictions, settings_without_effect
from lensmith.config.schema import list_settings, read_value
from lensmith.config.suggest import suggest_settings
from lensmith.config.tree import RunConfig
from lensmith.convert.nouns import (
    Argument,
    Converted,
    Found,
    Left,
    Noted,
    Reference,
    Rule,
    Setting,
    Skip,
    Table,
    Unread,
    Without,
)

DEFAULT = ", the default there"
SHOWN_CHARACTERS = 70
TAKES_REFERENCES = ("model", "grpo.rewards", "precision")
"""Settings whose rules know what to do with the name of a function or a type."""


def settle(found: Found, table: Table, source: str) -> Converted:
    """Every argument ends in exactly one of three lists: settings, without counterpart, not read."""
    given = {argument.name: argument for argument in found.arguments}
    unread = [_say_setting(one, table) for one in found.unread if not _is_wiring(one.name, table)]
    settings: dict[str, Setting] = {}
    answers: dict[str, Without] = {}
    partly: list[Left] = []
    for rule in table.rules:
        written = [given[name] for name in rule.names if name in given]
        mains = [one for one in written if one.name in rule.mains]
        if rule.ours in settings:
            continue
        if missing := next((one for one in unread if one.name in rule.names), None):
            told = Without(f"Goes with {missing.name.rpartition('.')[2]}, which could not be read: set {rule.ours}.")
            answers |= {one.name: told for one in mains if one.name not in answers}
            continue
        objects = [one for one in written if isinstance(one.value, Reference)]
        if objects and rule.ours not in TAKES_REFERENCES:
            unread += [_object(one, table) for one in objects if not _is_wiring(one.name, table)]
            continue
        answer = _answer(rule, given)
        if isinstance(answer, Without):
            answers |= {one.name: answer for one in mains if one.name not in answers}
        elif not isinstance(answer, Skip):
            setting = _setting(rule, answer, mains)
            if isinstance(answer, Noted) and answer.lost and mains:
                one = mains[0]
                partly.append(Left(str(one), _plain(one.value), one.where, answer.lost))
            if mains or (rule.assume and setting.value != read_value(RunConfig(), rule.ours)):
                settings[rule.ours] = setting
    if found.task == "grpo":
        settings["task"] = Setting("task", "grpo", "")
        _fill_groups(settings)
    kept, dropped = _consistent(settings)
    left = [*_left(given, table, kept, answers, unread), *partly, *dropped]
    remarks = [*found.remarks, *(told for path, told in table.unset.items() if path not in kept)]
    order = [setting.path for setting in list_settings()]
    settled = sorted(kept.values(), key=lambda setting: order.index(setting.path))
    left.sort(key=lambda one: not one.matters)
    return Converted(
        found.tool, found.task, source, tuple(settled), tuple(left), tuple(dict.fromkeys(unread)), tuple(remarks)
    )


def _answer(rule: Rule, given: Mapping[str, Argument]) -> Any:
    values = [given[name].value if name in given else default for name, default in rule.names.items()]
    try:
        return rule.translate(*values)
    except (TypeError, ValueError, AttributeError, IndexError, ArithmeticError):
        # A value of another kind than the tool takes; which of them is for the reader to see.
        shown = ", ".join(_short(value) for value in values)
        return Without(f"{shown} is not what this is usually set to; set {rule.ours}.")


def _setting(rule: Rule, answer: Any, written: Sequence[Argument]) -> Setting:
    value, note = (answer.value, answer.note) if isinstance(answer, Noted) else (answer, "")
    if written:
        told = ", ".join(f"{one} = {_short(one.value)}" if " = " not in str(one) else str(one) for one in written)
        origin = f"{told} ({_places([one.where for one in written])})"
    else:
        defaults = ((name.rpartition(".")[2], rule.names[name]) for name in rule.mains)
        told = ", ".join(f"{name} = {_short(value)}" for name, value in defaults if name and value is not None)
        origin = f"{told}{DEFAULT}" if told else DEFAULT.lstrip(", ")
    return Setting(
        rule.ours,
        value,
        origin,
        " ".join(filter(None, [rule.note if written or note else "", note])),
        tuple(one.name for one in written),
    )


def _say_setting(one: Unread, table: Table) -> Unread:
    paths = table.settings_of(one.name)
    return Unread(one.where, f"{one.what}; set {paths[0]}" if paths else one.what, one.name)


def _object(argument: Argument, table: Table) -> Unread:
    paths = table.settings_of(argument.name)
    what = f"{argument} = {argument.value.name} is no plain value"
    return Unread(argument.where, f"{what}; set {paths[0]}" if paths else what, argument.name)


def _is_wiring(name: str, table: Table) -> bool:
    return name in table.without and not table.without[name].matters


def _left(
    given: Mapping[str, Argument],
    table: Table,
    settings: Mapping[str, Setting],
    answers: Mapping[str, Without],
    unread: Sequence[Unread],
) -> Iterator[Left]:
    for name, argument in given.items():
        if any(one.name == name for one in unread) or name.endswith("."):
            continue
        paths = table.settings_of(name)
        if name in table.without:
            told = table.without[name]
        elif not paths:
            near = suggest_settings(name.rpartition(".")[2])
            told = Without(f"Not among the {table.tool} arguments that are known here. {near}".strip())
        elif name in answers and not any(name in settings[path].names for path in paths if path in settings):
            told = answers[name]
        elif not any(name in settings[path].names for path in paths if path in settings) and argument.value is not None:
            told = Without(f"Decided together with {_others(table, name)}.", matters=False)
        else:
            continue
        matters = told.matters and not any(argument.value is one or argument.value == one for one in told.same)
        if matters or not isinstance(argument.value, Reference):
            yield Left(str(argument), _plain(argument.value), argument.where, told.why, matters)


def _others(table: Table, name: str) -> str:
    """The setting that an argument has a say in without being told beside it."""
    return ", ".join(dict.fromkeys(table.settings_of(name)))


def _fill_groups(settings: dict[str, Setting]) -> None:
    """Where the file does not say how large a step is, ours has to hold whole groups of theirs."""
    group, ours = settings.get("grpo.group"), RunConfig().optim.effective_samples
    if "optim.effective_samples" not in settings and group and type(group.value) is int and group.value > 0:
        whole = math.ceil(ours / group.value) * group.value
        if whole != ours:
            note = f"Lensmith's own {ours}, in whole groups."
            settings["optim.effective_samples"] = Setting("optim.effective_samples", whole, "", note)


def _consistent(settings: Mapping[str, Setting]) -> tuple[dict[str, Setting], list[Left]]:
    """Without values that a setting cannot take, and without those that have no effect or contradict beside the others."""
    kept, dropped = dict(settings), []
    while True:
        problems = _wrong_values(kept) or _wrong_together(kept)
        if not problems:
            return kept, dropped
        for path, why in problems.items():
            setting = kept.pop(path)
            # A default of theirs that means nothing here is nobody's concern.
            if setting.names:
                dropped.append(Left(setting.origin, setting.value, "", why))


def _wrong_values(settings: Mapping[str, Setting]) -> dict[str, str]:
    """Path -> why, for values that are not of the kind that the setting takes; judged as read_config judges them."""
    wrong: set[str] = set()
    try:
        RunConfig.model_validate(nested({path: setting.value for path, setting in settings.items()}))
    except ValidationError as caught:
        places = {".".join(str(part) for part in error["loc"]) for error in caught.errors()}
        wrong = {path for path in settings if any(place == path or place.startswith(f"{path}.") for place in places)}
        assert wrong, "a value that no setting holds cannot be wrong"
    known = {setting.path: setting for setting in list_settings()}
    wrong |= {path for path, setting in settings.items() if slips_through(known[path], setting.value)}
    return {path: f"{path} must be {known[path].allowed}." for path in settings if path in wrong}


def _wrong_together(settings: Mapping[str, Setting]) -> dict[str, str]:
    """Path -> why, for settings without effect, and of those that contradict one that can be left out."""
    config = RunConfig.model_validate(nested({path: setting.value for path, setting in settings.items()}))
    idle = settings_without_effect(config)
    problems = {path: f"{path} {idle[path].why}" for path in settings if path in idle}
    for problem in contradictions(config):
        guilty = next(
            (
                path
                for path in (problem.path, *settings)
                if path in settings and path in f"{problem.path} {problem.why}"
            ),
            None,
        )
        assert guilty, "defaults alone do not contradict"
        problems[guilty] = f"{problem.path} is {read_value(config, problem.path)}, {problem.why}"
    return problems


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted paths -> a tree."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *sections, leaf = path.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    return tree


def _plain(value: Any) -> Any:
    if isinstance(value, Reference):
        return value.name
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _places(places: Sequence[str]) -> str:
    """`cell 9, line 3` and `cell 9, line 5` -> `cell 9, lines 3 and 5`."""
    lines: dict[str, list[str]] = {}
    for place in dict.fromkeys(places):
        start, word, number = place.rpartition("line ")
        lines.setdefault(start + word, []).append(number)
    told = [
        f"{start.replace('line ', 'lines ')}{' and '.join([', '.join(numbers[:-1]), numbers[-1]])}"
        if len(numbers) > 1
        else f"{start}{numbers[0]}"
        for start, numbers in lines.items()
    ]
    return "; ".join(told)


def _short(value: Any) -> str:
    plain = _plain(value)
    text = plain if isinstance(value, Reference) else repr(plain)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."
