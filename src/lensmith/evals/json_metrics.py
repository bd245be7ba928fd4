"""How well an answer that is JSON agrees with another, or with a schema, pure."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

FENCE = "```"
Field = tuple[tuple[str, ...], str]
"""Keys from the outermost in, and the value as text."""


def read_json(text: str) -> Any:
    """The JSON that a whole answer is, with or without code fences around it.

    Raises:
        ValueError: it is no JSON; NaN and Infinity are none. RecursionError: it nests deeper than any reader.
    """
    text = text.strip()
    if text.startswith(FENCE) and text.endswith(FENCE):
        text = text.strip("`").removeprefix("json")
    return json.loads(text, parse_constant=_refuse_constant)


def json_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over fields: a key path with its value; range 0 to 1, symmetric.

    The field-level F1 of Donut, arXiv:2111.15664, section 3.1, for one answer: items of a list share the path of the list,
    so their order does not count. Numbers are compared by value and texts without white space at their ends. An answer that
    is no JSON scores 0.

    Raises:
        ValueError: the reference is no JSON.
    """
    try:
        meant = Counter(list_fields(read_json(reference)))
    except (ValueError, RecursionError) as cause:
        raise ValueError(f"the reference {reference[:60]!r} is no JSON ({cause})") from cause
    try:
        said = Counter(list_fields(read_json(answer)))
    except (ValueError, RecursionError):  # a text of brackets alone nests deeper than any reader
        return 0.0
    if not said and not meant:
        return 1.0
    return 2 * (said & meant).total() / (said.total() + meant.total())


def list_fields(value: Any, path: tuple[str, ...] = ()) -> Iterator[Field]:
    """Every value that is neither an object nor a list, with the keys that lead to it."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from list_fields(inner, (*path, key))
    elif isinstance(value, list):
        for inner in value:
            yield from list_fields(inner, path)
    else:
        yield path, _as_text(value)


def fits_schema(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a value fits a JSON Schema; addresses in `$ref` are never fetched.

    Raises:
        referencing.exceptions.Unresolvable: the schema refers to what is not in it.
    """
    from jsonschema.validators import validator_for
    from referencing import Registry

    # Without a registry of its own jsonschema would fetch what `$ref` names, from wherever a row says.
    return validator_for(schema)(schema, registry=Registry()).is_valid(value)


def checked_schema(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema itself.

    Raises:
        ValueError: it is none; the message goes on after "it".
    """
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    try:
        validator_for(schema).check_schema(dict(schema))
    except SchemaError as cause:
        raise ValueError(f"is no JSON Schema: {cause.message}") from cause
    return schema


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")
