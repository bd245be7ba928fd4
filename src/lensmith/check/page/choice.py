"""Which rows the page shows: some drawn at random, those at the edges, and the first of every finding.

Every chosen row says why it is there, and everything that was found in it. The edges are looked for among rows that the
seed draws, because finding them among a million would mean encoding a million again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from lensmith.errors import RowError
from lensmith.types import counted

if TYPE_CHECKING:
    from lensmith.check.findings import Code, Severity
    from lensmith.check.report import CheckReport, Side
    from lensmith.data.source import SampleSource
    from lensmith.types import Encoded

Group = Literal["drawn", "edges", "found"]
Key = tuple["Side", int]

LOOKED_AT = 256
"""Rows among which the edges are looked for: headers only, well under a second."""
FOUND_SHARE = 0.5
"""Of the page for findings; beyond it, a finding gets a second row only where every finding has a first."""
DRAWN_LEAST = 4
"""Rows drawn at random, however many findings there are."""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a row is shown, or what was found in it."""

    text: str
    code: Code | None = None
    severity: Severity | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """One row to be shown."""

    side: Side
    row: int
    group: Group
    reasons: tuple[Reason, ...]

    @property
    def anchor(self) -> str:
        """Its name in links within the page."""
        return f"{self.side}-{self.row}"


def choose_rows(report: CheckReport, sources: Mapping[Side, SampleSource], *, seed: int, rows: int) -> list[Choice]:
    """At most `rows` rows, in groups: drawn at random by `seed`, at the edges, with findings."""
    found, drawn = _found(report), _permuted(sources, seed)
    edges = dict(_edges(report, sources, drawn[:LOOKED_AT]))
    chosen: dict[Key, Group] = {}
    _take(chosen, "found", _firsts(report), rows - DRAWN_LEAST - len(edges))
    _take(chosen, "found", _round_robin(report), int(rows * FOUND_SHARE))
    _take(chosen, "edges", edges, rows - DRAWN_LEAST)
    _take(chosen, "drawn", drawn, rows)
    reasons = {key: (*edges.get(key, ()), *found.get(key, ())) for key in chosen}
    ordered = sorted(chosen.items(), key=lambda item: ("drawn", "edges", "found").index(item[1]))
    return [Choice(side, row, group, reasons[side, row]) for (side, row), group in ordered]


def _take(chosen: dict[Key, Group], group: Group, keys: Iterable[Key], most: int) -> None:
    for key in keys:
        if len(chosen) >= most:
            return
        chosen.setdefault(key, group)


def _found(report: CheckReport) -> dict[Key, list[Reason]]:
    found: dict[Key, list[Reason]] = {}
    for finding in report.findings:
        for example in finding.examples:
            reason = Reason(example.sentence, finding.code, finding.severity)
            found.setdefault((example.side, example.row), []).append(reason)
    return found


def _firsts(report: CheckReport) -> list[Key]:
    return [(first.side, first.row) for finding in report.findings for first in finding.examples[:1]]


def _round_robin(report: CheckReport) -> Iterator[Key]:
    rounds = itertools.zip_longest(*(finding.examples for finding in report.findings))
    return ((example.side, example.row) for example in itertools.chain.from_iterable(rounds) if example is not None)


def _permuted(sources: Mapping[Side, SampleSource], seed: int) -> list[Key]:
    """The first rows of a random order of all: enough for a page and for looking at edges."""
    lengths: list[tuple[Side, int]] = [(side, len(source)) for side, source in sources.items()]
    total = sum(length for _, length in lengths)
    picked = np.random.default_rng(seed).choice(total, min(total, 2 * LOOKED_AT), replace=False).tolist()
    return [_key(lengths, number) for number in picked]


def _key(lengths: list[tuple[Side, int]], number: int) -> Key:
    """The row with that number, the sides laid end to end."""
    for side, length in lengths:
        if number < length:
            return side, number
        number -= length
    raise IndexError(number)


def _edges(
    report: CheckReport, sources: Mapping[Side, SampleSource], keys: Sequence[Key]
) -> Iterator[tuple[Key, tuple[Reason, ...]]]:
    """The largest row of all; of those looked at the smallest, the most reduced picture and the longest answer."""
    reasons: dict[Key, list[Reason]] = {}
    for large in report.tokens.largest[:1]:
        reasons.setdefault((large.side, large.row), []).append(Reason(f"Most tokens: {large.tokens:,}."))
    looked_at = dict(_encoded(sources, keys))
    among = (
        "all rows" if len(keys) == sum(map(len, sources.values())) else f"{counted(len(looked_at), 'row')} looked at"
    )
    for name, score in EDGES.items():
        best = max(looked_at, key=lambda key: score(looked_at[key]), default=None)
        if best is not None and score(looked_at[best]) > NOTHING:
            reasons.setdefault(best, []).append(Reason(f"{name} of {among}."))
    return ((key, tuple(told)) for key, told in reasons.items())


def _encoded(sources: Mapping[Side, SampleSource], keys: Sequence[Key]) -> Iterator[tuple[Key, Encoded]]:
    for side, row in keys:
        try:
            yield (side, row), sources[side].encoded(row)
        except RowError:  # refused rows are among the findings
            continue


NOTHING = -1e9
EDGES: dict[str, Callable[[Encoded], float]] = {
    "Fewest tokens": lambda sample: -sample.num_tokens,
    "Most reduced picture": lambda sample: max((-i.scale for i in sample.images if i.scale < 1), default=NOTHING),
    "Longest answer": lambda sample: sample.num_learned,
}
"""What to look for -> how far a sample goes that way; NOTHING where there is nothing to show."""
