"""The gate's outcome for a terminal, in words as well as colours, on light and on dark grounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lensmith.export.verify.check import Check, Name, Verified

if TYPE_CHECKING:
    from rich.table import Table

QUESTIONS: dict[Name, str] = {
    "changed": "exactly the tuned tensors changed",
    "reload": "plain transformers and PEFT load it",
    "agree": "adapter, merged and reloaded agree, the base differs",
    "inputs": "serving sees what training saw",
    "blind": "the pictures are used",
    "health": "no tensor is broken, dead or too large",
    "metric": "merged, it is as often right as before",
}
HELD: dict[Name, str] = {"blind": ">", "metric": "≥"}
"""How value and bound compare where all is well; ≤ elsewhere."""
VERDICTS = {True: ("passed", "green"), False: ("FAILED", "bold red"), None: ("not run", "magenta")}


def verify_screen(verified: Verified) -> Iterator[Table | str]:
    """A table, what to do about each check that failed or was not run, and the verdict."""
    yield _table(verified)
    for check in verified.checks:
        if check.fix:
            yield f"\n{check.name}: {check.fix}"
    failed = [check.name for check in verified.checks if check.ok is False]
    passed = sum(check.ok is True for check in verified.checks)
    if failed:
        yield f"\nNot ready: {', '.join(failed)} failed. See docs/verify.md."
    elif passed == len(verified.checks):
        yield f"\nAll {passed} checks passed: what was trained is what is shipped."
    else:
        yield f"\nNone failed: {passed} of {len(verified.checks)} checks passed, the others could not be run."


def _table(verified: Verified) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 1, 0))
    for heading in ("check", "verdict", "what was found"):
        table.add_column(heading, no_wrap=heading != "what was found")
    for heading in ("number", "bound", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    for check in verified.checks:
        word, style = VERDICTS[check.ok]
        found = (
            Text.assemble(f"{QUESTIONS[check.name]}\n", (check.told, "dim"))
            if check.told
            else Text(QUESTIONS[check.name])
        )
        seconds = f"{check.seconds:,.1f} s"
        table.add_row(check.name, Text(word, style=style), found, *_numbers(check), seconds)
    return table


def _numbers(check: Check) -> tuple[str, str]:
    """What was measured, and what it has to be."""
    if check.bound is None:
        return "", ""
    value = "" if check.value is None else f"{check.value:.2g}"
    return value, f"{HELD.get(check.name, '≤')} {check.bound:g}"
