"""From the `rewards` of a config to functions that can be called: names, files, weights and parameters, all checked here.

    rewards:
      - math_boxed                                           # a name from REWARDS
      - {name: length, weight: 0.5, max_tokens: 1024}        # with a weight, and its parameters
      - my_rewards.py:price_match                            # a function of your own

docs/rewards.md has the table of names, and how to write one.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from lensmith.config.suggest import suggest_choice
from lensmith.config.tree import RunConfig
from lensmith.errors import ConfigError
from lensmith.evals.answer_text import extract_boxed as extract_boxed_answer
from lensmith.evals.own_functions import find_function
from lensmith.train.reward_calls import read_signature
from lensmith.train.reward_functions import REWARDS, RewardFunction
from lensmith.train.reward_set import OnError, Reward, RewardBatch, RewardFailure, RewardSet, RewardTable

__all__ = [
    "REWARDS",
    "Reward",
    "RewardBatch",
    "RewardFailure",
    "RewardFunction",
    "RewardSet",
    "RewardSpec",
    "RewardTable",
    "extract_boxed_answer",
    "load_rewards",
    "read_reward_specs",
]

Written = str | Mapping[str, Any] | Callable[..., Any]
"""A reward as somebody writes it: a name, a file and a function, a mapping with one of these under `name`, a function."""


@dataclass(frozen=True, slots=True)
class RewardSpec:
    """One reward as it was asked for; whether it exists is not known yet."""

    place: str
    """`grpo.rewards[0]`: every message about it starts with it."""
    name: str | Callable[..., Any]
    weight: float
    parameters: Mapping[str, Any]
    label: str
    """Of its column in logs: its name, or what `as` says."""


def load_rewards(specs: Sequence[Written], *, root: Path, on_error: OnError = "count") -> RewardSet:
    """The rewards of a run, ready to score.

    Args:
        root: folder that files of reward functions start from. They are run here, as any Python file you start.
        on_error: what a reward that raises does: "count" leaves its completions without a number, "raise" stops.

    Raises:
        ConfigError: a name, file, function or parameter does not exist or is wrong.
    """
    modules: dict[Path, ModuleType] = {}
    return RewardSet([_load(spec, root, modules) for spec in read_reward_specs(specs)], on_error)


def run_rewards(config: RunConfig) -> RewardSet:
    """The rewards of a GRPO run; `length` judges by grpo.max_new_tokens unless it names a limit of its own.

    Files of functions start from the folder that the command runs in, as data files do.

    Raises:
        ConfigError: as `load_rewards`.
    """
    written = [dict(spec) if isinstance(spec, dict) else {"name": spec} for spec in config.grpo.rewards]
    known = {"max_tokens": config.grpo.max_new_tokens}
    specs = [{**known, **spec} if spec.get("name") == "length" else spec for spec in written]
    return load_rewards(specs, root=Path.cwd(), on_error=config.rollout.on_reward_error)


def read_reward_specs(specs: Sequence[Written]) -> tuple[RewardSpec, ...]:
    """The rewards as asked for, in order; nothing is loaded or run.

    Raises:
        ConfigError: there are none, one is written in no known way, or two would share a column.
    """
    if isinstance(specs, str | Mapping) or not specs:
        raise ConfigError(f"grpo.rewards is {specs!r}, but must be a list of at least 1 reward, such as [math_boxed].")
    read = tuple(_read(f"grpo.rewards[{number}]", spec) for number, spec in enumerate(specs))
    places: dict[str, str] = {}
    for spec in read:
        first = places.setdefault(spec.label, spec.place)
        if first != spec.place:
            raise ConfigError(
                f"{spec.place} is {spec.label!r}, and so is {first}; their numbers would share one column. "
                f"Give one another name: {{name: {spec.label}, as: {spec.label}_2}}."
            )
    return read


def _read(place: str, spec: Written) -> RewardSpec:
    fields = dict(spec) if isinstance(spec, Mapping) else {"name": spec}
    name, weight, label = fields.pop("name", None), fields.pop("weight", 1.0), fields.pop("as", None)
    if not (isinstance(name, str) and name) and not callable(name):
        raise ConfigError(
            f"{place} is {spec!r}, but must be a name, a function as my_rewards.py:price_match, or a mapping with one of "
            "these under `name`."
        )
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ConfigError(f"{place}.weight is {weight!r}, but must be a finite number, such as 1.0.")
    if label is not None and not (isinstance(label, str) and label):
        raise ConfigError(f"{place}.as is {label!r}, but must be a name for its column.")
    called = name if isinstance(name, str) else getattr(name, "__name__", type(name).__name__)
    return RewardSpec(place, name, float(weight), fields, label or called.rpartition(":")[2])


def _load(spec: RewardSpec, root: Path, modules: dict[Path, ModuleType]) -> Reward:
    if isinstance(spec.name, str) and ":" not in spec.name:
        return _load_named(spec, spec.name)
    function = spec.name
    if isinstance(function, str):
        example = "my_rewards.py:price_match"
        function = find_function(function, root=root, place=spec.place, example=example, modules=modules)
    try:
        signature = read_signature(function)
    except (TypeError, ValueError) as cause:
        raise ConfigError(
            f"{spec.place}: {spec.label} does not tell its parameters ({cause}), so it cannot be called. Wrap it in a def."
        ) from cause
    accepted = tuple(signature.named)
    for name in spec.parameters:
        if name not in accepted and not signature.takes_all:
            held = ", ".join(accepted) or "none"
            raise ConfigError(
                f"{spec.place}: {spec.label} has no parameter {name!r}; it has {held}. "
                f"{suggest_choice(name, accepted)}".strip()
            )
    home = spec.name if isinstance(spec.name, str) else ""
    return Reward(spec.label, function, spec.weight, spec.parameters, signature.without(spec.parameters), home)


def _load_named(spec: RewardSpec, name: str) -> Reward:
    if name not in REWARDS:
        near = suggest_choice(name, tuple(REWARDS))
        way_out = near or "A function of your own is written my_rewards.py:function."
        raise ConfigError(f"{spec.place}: there is no reward {name!r} among {', '.join(REWARDS)}. {way_out}")
    parameters = _check_parameters(spec, REWARDS[name])
    return Reward(spec.label, REWARDS[name], spec.weight, parameters)


def _check_parameters(spec: RewardSpec, function: RewardFunction) -> dict[str, Any]:
    """The parameters that were set, as the function's annotations want them."""
    known = {one.name: one for one in inspect.signature(function).parameters.values() if one.kind is one.KEYWORD_ONLY}
    hints = get_type_hints(function, include_extras=True)
    for name, one in known.items():
        if one.default is one.empty and name not in spec.parameters:
            raise ConfigError(
                f"{spec.place}: {spec.label} needs {name}, which is not set. Write {{name: {spec.name}, {name}: ...}}."
            )
    checked = {}
    for name, value in spec.parameters.items():
        if name not in known:
            near = suggest_choice(name, tuple(known))
            raise ConfigError(
                f"{spec.place}: {spec.label} has no parameter {name!r} (set to {value!r}); it has "
                f"{', '.join(known)}. {near}".strip()
            )
        try:
            checked[name] = TypeAdapter(hints[name], config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError as cause:
            reason = cause.errors(include_url=False)[0]["msg"]
            raise ConfigError(
                f"{spec.place}.{name} is {value!r}: {reason[:1].lower()}{reason[1:]}. docs/rewards.md says what it may be."
            ) from cause
    return checked
