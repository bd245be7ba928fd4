"""Keyword arguments as people write them: old names mapped with one warning, known ones told apart, unknown ones refused.

A swallowed keyword is a silent wrong run, so each ends in one of four ways: it is used; it has nothing to do here, and that
is said; it would have changed the result and cannot, which is an error; nobody knows it, which is an error with a hint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lensmith.config.suggest import suggest_choice
from lensmith.errors import ConfigError
from lensmith.recipe.speech import say_once, warn_renamed

Kind = Literal["used", "idle", "refused"]


@dataclass(frozen=True, slots=True)
class Keyword:
    """One keyword of a call, as its home documents it and as it is understood here."""

    theirs: Any
    """Its default at home: Unsloth's where Unsloth sets one, else TRL's."""
    here: str
    """What becomes of it. For the table; of an idle one why it has nothing to do, of a refused one the way out."""
    kind: Kind = "used"


def idle(theirs: Any, why: str) -> Keyword:
    """One that has nothing to do here, whatever its value."""
    return Keyword(theirs, why, "idle")


def refused(theirs: Any, way_out: str) -> Keyword:
    """One that cannot be honoured unless it has its default."""
    return Keyword(theirs, way_out, "refused")


def read_keywords(
    call: str,
    given: Mapping[str, Any],
    known: Mapping[str, Keyword],
    renamed: Mapping[str, str],
    *,
    elsewhere: str = "",
) -> dict[str, Any]:
    """Those of the given keywords that are used, under their names of today.

    Args:
        call: what was called, as messages name it.
        renamed: old name -> today's, which is in `known`.
        elsewhere: ends the sentence about an unknown keyword, where there is more to say.

    Raises:
        ConfigError: a keyword is unknown, given under two names, or cannot be honoured.
    """
    current: dict[str, Any] = {}
    for name, value in given.items():
        today = renamed.get(name, name)
        if today in current:
            raise ConfigError(f"{call}: {name} and {today} are one setting by two names; give {today} alone.")
        if today not in known:
            raise ConfigError(_unknown(call, name, value, known, renamed, elsewhere))
        current[today] = value
    if old := [f"{name} is {renamed[name]} today" for name in given if name in renamed]:
        warn_renamed(f"{call}: {', '.join(old)}; understood so.")
    for name, value in current.items():
        if known[name].kind == "refused" and not _same(value, known[name].theirs):
            raise ConfigError(f"{call}: {name}={value!r} cannot be honoured here. {known[name].here}")
    if without := [name for name in current if known[name].kind == "idle"]:
        reasons: dict[str, list[str]] = {}
        for name in without:
            reasons.setdefault(known[name].here, []).append(name)
        told = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
        say_once(f"{call}: without effect here: {told}.")
    return {name: value for name, value in current.items() if known[name].kind == "used"}


def _same(value: Any, theirs: Any) -> bool:
    """Whether a value asks for nothing else than the default; None, {} and () all say "nothing"."""
    return value is theirs or (not value and not theirs) or (type(value) is type(theirs) and bool(value == theirs))


def _unknown(
    call: str, name: str, value: Any, known: Mapping[str, Keyword], renamed: Mapping[str, str], elsewhere: str
) -> str:
    hint = suggest_choice(name, [*known, *renamed])
    shown = repr(value) if len(repr(value)) < 80 else type(value).__name__
    return f"{call}: there is no keyword {name} (given {shown}). {hint or elsewhere}".strip()
