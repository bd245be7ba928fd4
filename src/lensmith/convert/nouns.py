"""What is found in another tool's file, and what a table says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Tool = Literal["unsloth", "trl", "llama-factory", "ms-swift"]
Task = Literal["sft", "grpo"]

TITLES: Mapping[Tool, str] = {
    "unsloth": "an Unsloth script",
    "trl": "a TRL script",
    "llama-factory": "LLaMA-Factory settings",
    "ms-swift": "ms-swift arguments",
}


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument as it is written."""

    name: str
    """As the tables have it: `learning_rate`, or `config.learning_rate` where several calls share names."""
    value: Any
    """A plain value, or a Reference."""
    where: str
    """`line 12`, or `cell 3, line 4`."""
    shown: str = ""
    """As a person knows it: `SFTConfig(learning_rate)`. Empty: the name."""

    def __str__(self) -> str:
        return self.shown or self.name


@dataclass(frozen=True, slots=True)
class Reference:
    """A name in a script that stands for a function, a class or an object rather than for a plain value."""

    name: str
    where: str = ""
    """Where a function of the file itself stands: `lines 4 to 30`; empty for what is imported or computed."""


@dataclass(frozen=True, slots=True)
class Unread:
    """Something that is computed, or that stands where it is never read from."""

    where: str
    what: str
    name: str = ""
    """The argument that it would be the value of, as the tables have it."""


@dataclass(frozen=True, slots=True)
class Found:
    """All that a reader found in a file, before any table is asked."""

    tool: Tool
    task: Task
    arguments: tuple[Argument, ...]
    unread: tuple[Unread, ...] = ()
    remarks: tuple[str, ...] = ()
    """Sentences for the top of run.yaml, about the file as a whole."""


@dataclass(frozen=True, slots=True)
class Without:
    """A rule's answer where our settings have no counterpart for a value."""

    why: str
    """What to do instead, or why nothing needs doing."""
    matters: bool = True
    """False where Lensmith does the same anyway, so that nobody needs to act."""
    same: tuple[Any, ...] = (None, False)
    """Values that are as good as saying nothing."""


@dataclass(frozen=True, slots=True)
class Noted:
    """A rule's answer where the value carries over, but there is something to know about this value."""

    value: Any
    note: str
    lost: str = ""
    """What of the value does not carry over, for the list of what has no counterpart."""


@dataclass(frozen=True, slots=True)
class Skip:
    """A rule's answer where another rule decides."""


SKIP = Skip()


@dataclass(frozen=True, slots=True)
class Rule:
    """How some of their arguments become one of our settings."""

    names: Mapping[str, Any]
    """Their names -> the default that the tool takes where nothing is written."""
    ours: str
    """Dotted path of the setting."""
    translate: Callable[..., Any] = field(default=lambda value: value)
    """Gets the values in the order of `names`; returns ours, Noted, Without or SKIP."""
    note: str = ""
    """What differs in meaning; stands above the setting in run.yaml."""
    assume: bool = True
    """Whether the tool's defaults are carried over too, where they differ from ours."""
    beside: int = 0
    """How many of the names, from the last on, only help to understand the others: they alone set nothing."""

    @property
    def mains(self) -> tuple[str, ...]:
        """The names that the setting comes from."""
        return tuple(self.names)[: len(self.names) - self.beside]


@dataclass(frozen=True, slots=True)
class Table:
    """All that is known of one tool's arguments."""

    tool: Tool
    version: str
    """Of the source that names and defaults were read from."""
    rules: tuple[Rule, ...]
    without: Mapping[str, Without]
    """Names for which there is never a counterpart."""
    unset: Mapping[str, str] = field(default_factory=dict)
    """Path of a setting -> what to know where the file says nothing of it."""

    def __post_init__(self) -> None:
        ruled = {name for rule in self.rules for name in rule.names}
        assert not ruled & set(self.without), f"{self.tool}: both ruled and without: {ruled & set(self.without)}"

    def settings_of(self, name: str) -> tuple[str, ...]:
        """Paths of our settings that an argument has a say in; first the one that it decides most alone."""
        rules = sorted((rule for rule in self.rules if name in rule.names), key=lambda rule: len(rule.names))
        return tuple(rule.ours for rule in rules)


@dataclass(frozen=True, slots=True)
class Setting:
    """One line of the run.yaml."""

    path: str
    value: Any
    origin: str
    """Their arguments with values and places, for the comment beside it."""
    note: str = ""
    names: tuple[str, ...] = ()
    """The arguments that it comes from, as the tables have them; none where it is a default of the tool."""


@dataclass(frozen=True, slots=True)
class Left:
    """An argument that has no counterpart."""

    name: str
    value: Any
    where: str
    why: str
    matters: bool = True


@dataclass(frozen=True, slots=True)
class Converted:
    """What became of a file."""

    tool: Tool
    task: Task
    source: str
    settings: tuple[Setting, ...]
    without: tuple[Left, ...]
    unread: tuple[Unread, ...]
    remarks: tuple[str, ...]
