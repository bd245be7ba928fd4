"""The config tree as a flat list of settings: their paths, what each accepts in words, defaults and meaning.

Error sentences, `lensmith config`, docs/config.md and the starter file all read this list, so they cannot disagree.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lensmith.config.tree import OwnFunction, RunConfig, ServerAddress

BOUNDS: Mapping[type, tuple[str, str]] = {
    Gt: ("gt", "above"),
    Ge: ("ge", "at least"),
    Lt: ("lt", "below"),
    Le: ("le", "at most"),
    MinLen: ("min_length", "with at least"),
}
PLAIN_WORDS: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    type(None): "null",
    dict[str, Any]: "a mapping",
    OwnFunction: "a function as file.py:name",
    ServerAddress: "an address such as http://127.0.0.1:8000, without a path",
}


@dataclass(frozen=True, slots=True)
class Setting:
    """One leaf of the config tree."""

    path: str
    """Dotted, as in an override: `optim.learning_rate`."""
    annotation: Any
    default: Any
    section: type[BaseModel]
    """The class that it is a field of."""

    @property
    def doc(self) -> str:
        """What stands under the field, in one line."""
        return " ".join(_field_docs(self.section).get(self.leaf, "").split())

    @property
    def leaf(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def allowed(self) -> str:
        """What may be written here, in words."""
        return describe_type(self.annotation)

    @property
    def choices(self) -> tuple[str, ...]:
        """The words to choose from; empty where anything of the type will do."""
        return tuple(_choices(self.annotation))

    def admits(self, kind: type) -> bool:
        """Whether a value of this plain type is one of those meant (pydantic alone would take true for 1)."""
        return kind in _alternatives(self.annotation)


@cache
def list_settings() -> tuple[Setting, ...]:
    """Every leaf of the tree, in the order of the tree."""
    return tuple(_walk(RunConfig, ""))


@cache
def list_sections() -> Mapping[str, tuple[str, ...]]:
    """Dotted path of every section -> the names it may hold; the root is the empty path."""
    sections: dict[str, list[str]] = {"": []}
    for setting in list_settings():
        names = setting.path.split(".")
        for depth, name in enumerate(names):
            held = sections.setdefault(".".join(names[:depth]), [])
            if name not in held:
                held.append(name)
    return {path: tuple(names) for path, names in sections.items()}


def describe_section(path: str) -> str:
    """The docstring of a section where it has one of its own, else nothing."""
    model: type[BaseModel] = RunConfig
    for name in path.split(".") if path else ():
        model = typing.get_type_hints(model)[name]
    return (model.__dict__.get("__doc__") or "").strip()


def read_value(config: RunConfig, path: str) -> Any:
    """The value at a dotted path."""
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def describe_type(annotation: Any) -> str:
    """An annotation in words: `Annotated[int, Field(ge=1)] | None` -> "a whole number, at least 1, or null"."""
    described = _describe_one(annotation)
    if described:
        return described
    words = [_describe_one(part) or describe_type(part) for part in typing.get_args(annotation)]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f", or {words[-1]}"


def _describe_one(annotation: Any) -> str | None:
    if annotation in PLAIN_WORDS:
        return PLAIN_WORDS[annotation]
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(str(choice) for choice in args)
    if origin is typing.Annotated:
        return describe_type(args[0]) + _describe_bounds(args[1:])
    if origin is list:
        choices = list(_choices(args[0]))
        return "a list " + ("from " if choices else "of ") + (", ".join(choices) or describe_type(args[0]))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "{" + ", ".join(annotation.model_fields) + "}"
    return None


def _describe_bounds(metadata: tuple[Any, ...]) -> str:
    bounds = [bound for part in metadata if isinstance(part, FieldInfo) for bound in part.metadata]
    words = " and ".join(f"{BOUNDS[type(bound)][1]} {getattr(bound, BOUNDS[type(bound)][0])}" for bound in bounds)
    return (", " if words.startswith("at") else " ") + words if words else ""


def _alternatives(annotation: Any) -> Iterator[Any]:
    """The plain types that an annotation accepts, without bounds."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        yield from _alternatives(args[0])
    elif origin in (types.UnionType, typing.Union):
        for part in args:
            yield from _alternatives(part)
    else:
        yield origin or annotation


def _choices(annotation: Any) -> Iterator[str]:
    if typing.get_origin(annotation) is Literal:
        yield from (str(choice) for choice in typing.get_args(annotation))
    else:
        for part in typing.get_args(annotation):
            yield from _choices(part)


def _walk(model: type[BaseModel], prefix: str) -> Iterator[Setting]:
    hints = typing.get_type_hints(model, include_extras=True)
    for name, info in model.model_fields.items():
        hint = hints[name]
        if isinstance(hint, type) and issubclass(hint, BaseModel):
            yield from _walk(hint, f"{prefix}{name}.")
        else:
            yield Setting(prefix + name, hint, info.default, model)


@cache
def _field_docs(section: type[BaseModel]) -> Mapping[str, str]:
    """Field -> the string under it.

    Read when somebody asks: pydantic's use_attribute_docstrings parses the source of every section at each start, which
    was 18 ms of the 300 that `lensmith plan` has.
    """
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(tree, ast.ClassDef), "sections are classes"
    docs = {}
    for field, told in itertools.pairwise(tree.body):
        if isinstance(field, ast.AnnAssign) and isinstance(told, ast.Expr) and isinstance(told.value, ast.Constant):
            docs[ast.unparse(field.target)] = str(told.value.value)
    return docs
