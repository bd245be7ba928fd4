"""Rows that are left out: every one is counted, and of each kind the first few are named.

A data set with the wrong image root refuses every row; a million sentences would say no more than ten.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from lensmith.errors import RowCode

NAMED_ROWS = 10
"""Rows of each code that are kept with their sentences."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A row that is left out, and why."""

    where: str
    code: RowCode
    sentence: str


@dataclass(slots=True)
class Refusals:
    """What is known of the rows that are left out, in their order."""

    named: list[Refusal] = field(default_factory=list)
    """The first NAMED_ROWS of each code."""
    counts: Counter[RowCode] = field(default_factory=Counter)

    def __len__(self) -> int:
        return self.counts.total()

    def __add__(self, others: Refusals) -> Refusals:
        whole = Refusals()
        whole.extend(self)
        whole.extend(others)
        return whole

    def add(self, refusal: Refusal) -> None:
        """One more row."""
        if self.counts[refusal.code] < NAMED_ROWS:
            self.named.append(refusal)
        self.counts[refusal.code] += 1

    def extend(self, others: Refusals) -> None:
        """Those of later rows."""
        room = {code: NAMED_ROWS - self.counts[code] for code in others.counts}
        for refusal in others.named:
            if room[refusal.code] > 0:
                self.named.append(refusal)
                room[refusal.code] -= 1
        self.counts.update(others.counts)

    def of(self, code: RowCode) -> Refusals:
        """Those for one reason."""
        count = self.counts[code]
        return Refusals(
            [refusal for refusal in self.named if refusal.code == code], Counter({code: count} if count else {})
        )

    def lines(self, most: int) -> str:
        """A line for each of the first rows, and how many more there are."""
        lines = [f"  {refusal.where}: {refusal.sentence}" for refusal in self.named[:most]]
        more = len(self) - len(lines)
        return "\n".join([*lines, f"  and {more:,} more"] if more else lines)

    def sentence(self, most: int) -> str:
        """How many for which reason, and where the first of each are; empty without any."""
        if not self.named:
            return ""
        kinds = [
            f"{count:,} {code} ({listed([refusal.where for refusal in self.of(code).named[:most]], count)})"
            for code, count in self.counts.most_common()
        ]
        return f"Left out: {'; '.join(kinds)}. First: {self.named[0].sentence}"


def listed(names: list[str], total: int) -> str:
    """Some names, and how many more there are."""
    return ", ".join(names) + (f" and {total - len(names):,} more" if total > len(names) else "")
