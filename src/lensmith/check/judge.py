"""What single rows do not tell: copies, conflicts, leaks, pictures shrunk as a rule, answers that are all alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lensmith.check.compare import find_conflicts, find_copies, find_leaks, find_near_copies
from lensmith.check.inspect import NO_IMPRESSION
from lensmith.check.report import EXAMPLES, WHERE_LIMIT, Example

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

    from lensmith.check.findings import Code
    from lensmith.check.gather import Gathered, Tally

HALF_SIDE = 0.5
"""Side seen / side on disk. Text that was 16 px high, as on most screens, is under 8 below it, and hard to read."""
SAME_ANSWERS_SHARE = 0.95
SAME_ANSWERS_ROWS = 10
"""Fewer rows are no data set yet, and may well agree."""


def judge_rows(sides: Sequence[Gathered], tally: Tally, *, allow_shrink: bool) -> None:
    """Add the findings that come from looking at all rows together."""
    for side in sides:
        _judge_copies(side, tally)
        _judge_conflicts(side, tally)
    if len(sides) > 1:
        train, test = sides
        _judge_leaks(train, test, tally)
    _judge_sizes(sides, tally, allow_shrink=allow_shrink)
    _judge_answers(sides, tally)


@dataclass(frozen=True, slots=True)
class CommonAnswer:
    """The last answer that most rows give."""

    text: str
    key: int
    rows: int


def most_common_answer(sides: Sequence[Gathered]) -> CommonAnswer | None:
    """The answer said most often, as its first row writes it; None without rows."""
    answered = np.concatenate([side.numbers["answered"] for side in sides]) if sides else np.zeros(0)
    if not len(answered):
        return None
    keys, counts = np.unique(answered, return_counts=True)
    key = keys[counts.argmax()]
    side = next(side for side in sides if key in side.numbers["answered"])
    row = int(side.numbers["rows"][np.flatnonzero(side.numbers["answered"] == key)[0]])
    return CommonAnswer(side.scan.source.samples[row].answer, int(key), int(counts.max()))


def _judge_copies(gathered: Gathered, tally: Tally) -> None:
    rows = gathered.numbers["rows"]
    first = find_copies(gathered.numbers["exact"])
    copies = first != np.arange(len(rows))
    tell = Teller(gathered, tally)
    tell.pairs("duplicate_row", rows[copies], rows[first[copies]], "is a copy of {}.")
    near, like = _near_rows(gathered, ~copies)
    tell.pairs("near_duplicate", near, like, "says the same as {}, about a picture that looks the same.")


def _judge_conflicts(gathered: Gathered, tally: Tally) -> None:
    rows = gathered.numbers["rows"]
    other, questions = find_conflicts(gathered.numbers["asked"], gathered.numbers["answered"])
    torn = other != np.arange(len(rows))
    sentence = "answers a question about its picture differently from {}."
    Teller(gathered, tally).pairs("conflicting_answer", rows[torn], rows[other[torn]], sentence)
    tally.count("conflicting_answer", questions - int(torn.sum()))


def _judge_leaks(train: Gathered, test: Gathered, tally: Tally) -> None:
    leaked, source = find_leaks(train.numbers["contents"], test.numbers["contents"])
    rows, first = np.unique(test.numbers["picture_rows"][leaked], return_index=True)
    trained = train.numbers["picture_rows"][source[first]]
    tell = Teller(test, tally, others=train)
    tell.pairs("leak_train_test", rows, trained, "shows a picture of {}, which is trained on.")


def _judge_sizes(sides: Sequence[Gathered], tally: Tally, *, allow_shrink: bool) -> None:
    scales = [side.scales for side in sides]
    joined = np.concatenate(scales) if scales else np.zeros(0)
    if not len(joined) or float(np.median(joined)) >= HALF_SIDE:
        return
    if allow_shrink:
        tally.soften("shrunk_images")
    for side, scale in zip(sides, scales, strict=True):
        order = np.argsort(scale, kind="stable")
        order = order[scale[order] < HALF_SIDE]
        rows, first = np.unique(side.numbers["picture_rows"][order], return_index=True)
        pictures = order[first]  # the most reduced one of each row

        def sentence(number: int, side: Gathered = side, pictures: np.ndarray = pictures) -> str:
            height, width, seen_height, seen_width = (
                side.numbers[name][pictures[number]] for name in ("heights", "widths", "seen_heights", "seen_widths")
            )
            return f"a picture of {width:,} x {height:,} px is seen at {seen_width:,} x {seen_height:,} px."

        Teller(side, tally).rows("shrunk_images", rows, sentence)


def _judge_answers(sides: Sequence[Gathered], tally: Tally) -> None:
    most = most_common_answer(sides)
    num_rows = sum(len(side.numbers["rows"]) for side in sides)
    if most is None or num_rows < SAME_ANSWERS_ROWS or most.rows < SAME_ANSWERS_SHARE * num_rows:
        return
    sentence = f"answers {most.text!r}, as {most.rows:,} of {num_rows:,} rows do."
    for side in sides:
        rows = side.numbers["rows"][side.numbers["answered"] == most.key]
        Teller(side, tally).rows("same_answers", rows, lambda _: sentence)


class Teller:
    """Adds findings about rows of one side, reading from disk again only those that are named."""

    def __init__(self, gathered: Gathered, tally: Tally, *, others: Gathered | None = None) -> None:
        """`others`: the side of the second row of each pair, where it is not that of the first."""
        self._gathered, self._others, self._tally = gathered, others or gathered, tally

    def rows(self, code: Code, rows: Int[np.ndarray, " rows"], sentence: Callable[[int], str]) -> None:
        """Add a finding about `rows`; `sentence(i)` is what to say of rows[i]."""
        for number, row in enumerate(rows[:WHERE_LIMIT].tolist()):
            told = sentence(number) if number < EXAMPLES else ""
            self._tally.add(code, Example(self._gathered.side, row, self._gathered.where(row), told))
        self._tally.count(code, max(0, len(rows) - WHERE_LIMIT))

    def pairs(
        self, code: Code, rows: Int[np.ndarray, " pairs"], others: Int[np.ndarray, " pairs"], sentence: str
    ) -> None:
        """Add a finding about `rows`; `sentence` has a gap for the name of the other row of each pair."""
        self.rows(code, rows, lambda number: sentence.format(self._others.where(int(others[number]))))


def _near_rows(
    gathered: Gathered, considered: Bool[np.ndarray, " rows"]
) -> tuple[Int[np.ndarray, " near"], Int[np.ndarray, " near"]]:
    """Row numbers of near copies and of what they are near to, among rows with one picture that has enough detail."""
    numbers = gathered.numbers
    owners, pictures, counts = np.unique(numbers["picture_rows"], return_index=True, return_counts=True)
    at = np.searchsorted(numbers["rows"], owners)
    kept = (counts == 1) & (numbers["colours"][pictures] != NO_IMPRESSION) & considered[at]
    at, pictures = at[kept], pictures[kept]
    earliest = find_near_copies(numbers["loose"][at], numbers["looks"][pictures], numbers["colours"][pictures])
    near = earliest != np.arange(len(at))
    rows = numbers["rows"][at]
    return rows[near], rows[earliest[near]]
