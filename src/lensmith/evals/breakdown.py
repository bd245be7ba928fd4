"""Where a score comes from: the same answers, group by group of a column or of what an answer looks like; pure."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lensmith.config.suggest import suggest_choice
from lensmith.data.box_text import find_boxes
from lensmith.errors import DataError
from lensmith.evals.answer_text import final_answer
from lensmith.evals.guess import LONG_ANSWER_WORDS, is_json_object
from lensmith.evals.normalise import normalise
from lensmith.evals.results import EvalResult, Prediction
from lensmith.evals.score import Score
from lensmith.evals.text_metrics import read_number

MOST_GROUPS = 8
"""More is a list nobody reads; the smallest are put together."""
LEAST_QUESTIONS = 5
"""A group of fewer has an interval from nearly nothing to nearly all, and goes with the others."""
OTHER, NOTHING = "other", "(none)"
SIZE_EDGES_PX = (256, 512, 1024, 2048, 4096)
"""Longer side of a picture; a bucket ends below each."""
CJK = {"CJK": "Han", "HIRAGANA": "Japanese", "KATAKANA": "Japanese", "HANGUL": "Korean"}
"""What Unicode's character names begin with -> the script, where that is not the same word."""

_PLACE = re.compile(r"[:#]\d+$")


@dataclass(frozen=True, slots=True)
class Group:
    """The questions that have one thing in common."""

    name: str
    score: Score
    chosen: tuple[int, ...]
    """Their numbers among the predictions."""

    @property
    def n(self) -> int:
        return len(self.chosen)


def break_down(result: EvalResult, by: str, *, most: int = MOST_GROUPS, least: int = LEAST_QUESTIONS) -> list[Group]:
    """A score per group, the largest first; groups beyond `most` and those of fewer than `least` questions are `other`, last.

    Args:
        by: `source` (the file), `script` (of the question), `answer_type`, `image_size`, or any column of the data.

    Raises:
        DataError: no row has such a column.
    """
    check_grouping(by, [prediction.columns for prediction in result.predictions])
    groups = [group_of(prediction, by) for prediction in result.predictions]
    counts = Counter(groups).most_common()
    kept = [name for name, count in counts if count >= least][:most]
    rest = [name for name, _ in counts if name not in kept]
    # A single group would only lose its name.
    chosen: dict[str, list[int]] = {name: [] for name in [*kept, *(rest if len(rest) == 1 else [OTHER])]}
    for number, name in enumerate(groups):
        chosen[name if name in chosen else OTHER].append(number)
    return [Group(name, result.score_of(rows), tuple(rows)) for name, rows in chosen.items() if rows]


def check_grouping(by: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise DataError where `by` is no grouping, and none of the rows, given as their columns, has a column of that name."""
    if by in GROUPINGS or any(by in columns for columns in rows):
        return
    known = list(dict.fromkeys((*GROUPINGS, *(name for columns in rows for name in columns))))
    raise DataError(
        f"breakdown by {by!r}: none of {len(rows):,} rows has such a column; there are {', '.join(known)}. "
        f"{suggest_choice(by, known)}".strip()
    )


def group_of(prediction: Prediction, by: str) -> str:
    """The name of the group that a prediction belongs to."""
    if by in prediction.columns or by not in GROUPINGS:
        value: Any = prediction.columns.get(by)
        return NOTHING if value is None else str(value)
    return GROUPINGS[by](prediction)


def script_of(text: str) -> str:
    """The script that most letters of a text are in, by Unicode's names: `Latin`, `Han`, `Cyrillic`; `(none)` without letters.

    A text with kana is Japanese however many Han characters it holds. Which language it is within a script is not told.
    """
    counts = Counter(_script(letter) for letter in text if letter.isalpha())
    if not counts:
        return NOTHING
    return "Japanese" if counts["Japanese"] else counts.most_common(1)[0][0]


def answer_type(text: str) -> str:
    """What kind of answer a reference is: boxes, JSON, yes or no, number, word, few words, or prose."""
    text = final_answer(text)
    if find_boxes(text):
        return "boxes"
    if is_json_object(text):
        return "JSON"
    if normalise(text) in ("yes", "no"):
        return "yes or no"
    if read_number(text) is not None:
        return "number"
    words = len(text.split())
    return "prose" if words >= LONG_ANSWER_WORDS else "few words" if words > 1 else "word"


def size_bucket(image_px: tuple[int, int] | None) -> str:
    """`512 to 1,023 px`, by the longer side; `(none)` where the size is not known."""
    if image_px is None:
        return NOTHING
    side = max(image_px)
    below = [edge for edge in SIZE_EDGES_PX if edge <= side]
    above = [edge for edge in SIZE_EDGES_PX if edge > side]
    if not above:
        return f"{below[-1]:,} px and more"
    return f"{below[-1]:,} to {above[0] - 1:,} px" if below else f"below {above[0]:,} px"


def _script(letter: str) -> str:
    first = unicodedata.name(letter, "UNKNOWN").partition(" ")[0]
    return CJK.get(first, first.capitalize())


def _source(where: str) -> str:
    """The file of `file:line` or `file#index`."""
    return _PLACE.sub("", where)


GROUPINGS: Mapping[str, Callable[[Prediction], str]] = {
    "source": lambda prediction: _source(prediction.where),
    "script": lambda prediction: script_of(prediction.question),
    "answer_type": lambda prediction: answer_type(prediction.reference),
    "image_size": lambda prediction: size_bucket(prediction.image_px),
}
"""Groupings that need no column; a column of the same name goes first."""


def groupings_of(predictions: Sequence[Prediction]) -> list[str]:
    """The groupings of GROUPINGS that tell these questions apart."""
    return [by for by in GROUPINGS if len({group_of(prediction, by) for prediction in predictions}) > 1]
