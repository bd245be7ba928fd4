"""The verdict of one check and of all of them: what was measured, against which bound, and what to do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, get_args

Name = Literal["changed", "reload", "agree", "inputs", "blind", "health", "metric"]
NAMES: tuple[Name, ...] = get_args(Name)
"""In the order they are shown."""

SHOWN = 3
"""Names told of a longer list."""


@dataclass(frozen=True, slots=True)
class Check:
    """One question to a run, answered."""

    name: Name
    ok: bool | None
    """None: could not be asked; does not fail the gate, and is shown."""
    value: float | None
    bound: float | None
    """What `value` is held against; which side is right is said by `told`."""
    told: str
    """What was found, for a person."""
    fix: str
    """What is wrong and what to do about it; why it was not run; empty where all is well."""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Exactly name, ok, value, bound, fix; a number that is none (NaN, infinity) is null, as JSON has no word for it."""
        value = self.value if self.value is not None and math.isfinite(self.value) else None
        return {"name": self.name, "ok": self.ok, "value": value, "bound": self.bound, "fix": self.fix}


@dataclass(frozen=True, slots=True)
class Verified:
    """All checks of one run."""

    run: Path
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether none failed; those that could not be run do not count."""
        return all(check.ok is not False for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """What `lensmith verify --json` prints."""
        return {"ok": self.ok, "checks": [check.to_json() for check in self.checks]}


def not_run(name: Name, why: str) -> Check:
    """A check that could not be asked, and the sentence that says why."""
    return Check(name, None, None, None, "", why)


def at_most(name: Name, value: float, bound: float, told: str, fix: str) -> Check:
    """Passes where `value` is at most `bound`; a value that is no number fails."""
    ok = bool(value <= bound)
    return Check(name, ok, value, bound, told, "" if ok else fix)


def listed(names: list[str]) -> str:
    """The first few names and how many more there are."""
    rest = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{rest}"


class Stopwatch:
    """Seconds by check: one check's work may be spread over several models, each loaded once."""

    def __init__(self) -> None:
        self.seconds: dict[Name, float] = dict.fromkeys(NAMES, 0.0)

    @contextmanager
    def running(self, name: Name) -> Iterator[None]:
        """Adds the block's time to that check."""
        started = perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += perf_counter() - started

    def stamp(self, check: Check) -> Check:
        """The check with its time."""
        return replace(check, seconds=self.seconds[check.name])
