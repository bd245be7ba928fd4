"""Which metric suits the data: guessed from the answers, the questions and the columns, and always said why; pure."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence

from lensmith.data.box_text import CONFIDENCE_KEYS, IMAGE_KEYS, KEYS, LABEL_KEYS, find_boxes
from lensmith.errors import DataError
from lensmith.evals.answer_text import final_answer
from lensmith.evals.json_metrics import list_fields, read_json
from lensmith.evals.metrics import Reference
from lensmith.evals.text_metrics import read_number

LONG_ANSWER_WORDS = 8
"""From here on a reference is prose, which no matching metric judges well; the sentence says so."""
MANY_PEOPLE = 9
"""Half of the rows with so many accepted answers: VQA's ten people, of whom one may be missing."""

BESIDE_BOXES = {*KEYS, *LABEL_KEYS, *CONFIDENCE_KEYS, *IMAGE_KEYS}
_MARKUP_START = ("{", "[", "<", "\\", "```")
_CHART = re.compile(r"\b(?:chart|graph|plot|axis|bars?|pie|histogram|legend|diagram)\b", re.IGNORECASE)

Guess = tuple[str, str]
"""Name and reason."""


def guess_metric(references: Sequence[str | Reference]) -> Guess:
    """The metric that suits these references, and the sentence that says why.

    Raises:
        DataError: there are no references.
    """
    if not references:
        raise DataError("scoring: 0 references. Name rows with answers in data.test.")
    rows = [Reference((one,)) if isinstance(one, str) else one for one in references]
    guesses = (_boxes, _json, _markup, _choices, _several, _chart_numbers, _prose)
    name, reason = next((found for guess in guesses if (found := guess(rows))), None) or _short(rows)
    return name, f"metric {name}{reason}"


def is_json_object(text: str) -> bool:
    """Whether a whole text is a JSON object, or a list that begins with one."""
    try:
        value = read_json(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, Mapping) or (isinstance(value, list) and bool(value) and isinstance(value[0], Mapping))


def _boxes(rows: Sequence[Reference]) -> Guess | None:
    found = _count(rows, _is_boxes)
    if 2 * found <= len(rows):
        return None
    return (
        "iou",
        f": {found:,} of {len(rows):,} answers are boxes; labels beside them do not count, metric map counts them",
    )


def _json(rows: Sequence[Reference]) -> Guess | None:
    found = _count(rows, lambda row: is_json_object(_text(row)))
    if 2 * found <= len(rows):
        return None
    return "json_f1", f": {found:,} of {len(rows):,} answers are JSON objects, compared field by field"


def _markup(rows: Sequence[Reference]) -> Guess | None:
    found = _count(rows, lambda row: _text(row).startswith(_MARKUP_START) or "\n" in _text(row))
    if 2 * found <= len(rows):
        return None
    return "exact", (
        f": {found:,} of {len(rows):,} answers are code, markup or several lines, where case and punctuation count"
    )


def _choices(rows: Sequence[Reference]) -> Guess | None:
    found = _count(rows, lambda row: len(_text(row)) == 1 and _text(row).upper() in row.options)
    if 2 * found <= len(rows):
        return None
    return "choice", f": {found:,} of {len(rows):,} answers are letters of options in the question"


def _several(rows: Sequence[Reference]) -> Guess | None:
    counts = [len(row.answers) for row in rows]
    found = sum(count > 1 for count in counts)
    if 2 * found <= len(rows):
        return None
    told = f": {found:,} of {len(rows):,} rows have several accepted answers in the column 'answers'"
    if statistics.median(counts) >= MANY_PEOPLE:
        return "vqa_soft", f"{told}, half of them {MANY_PEOPLE} or more, as people gave them"
    return "anls", f"{told}, of which the nearest in spelling counts"


def _chart_numbers(rows: Sequence[Reference]) -> Guess | None:
    numbers = _count(rows, lambda row: read_number(_text(row)) is not None)
    charts = _count(rows, lambda row: _CHART.search(row.question) is not None)
    # Numbers alone are counts, years and house numbers as often, and 5 % off is wrong for those.
    if 2 * numbers <= len(rows) or 2 * charts <= len(rows):
        return None
    return "relaxed", (
        f": {numbers:,} of {len(rows):,} answers are numbers and {charts:,} questions speak of charts, so 5 % off is right"
    )


def _prose(rows: Sequence[Reference]) -> Guess | None:
    words = statistics.median(len(_text(row).split()) for row in rows)
    if words < LONG_ANSWER_WORDS:
        return None
    return "token_f1", (
        f", but half of the {len(rows):,} answers have {words:g} words or more: it counts words in common and knows no "
        "meaning, so read the kept predictions too"
    )


def _short(rows: Sequence[Reference]) -> Guess:
    words = statistics.median(len(_text(row).split()) for row in rows)
    return "normalised", (
        f": short answers (half have {words:g} or fewer words), compared without case, punctuation and articles"
    )


def _text(row: Reference) -> str:
    return final_answer(row.answers[0])


def _is_boxes(row: Reference) -> bool:
    """Whether the answer is boxes and hardly more: not prose that holds some, nor a form whose fields have places."""
    text = _text(row)
    # Four numbers in brackets are a box only where the data says that it holds boxes.
    if not any(span.kind == "box" for span in find_boxes(text, bare=row.boxes is not None)):
        return False
    try:
        fields = list_fields(read_json(text))
    except (ValueError, RecursionError):
        return text.startswith(_MARKUP_START)
    return all(not path or path[-1] in BESIDE_BOXES for path, _ in fields)


def _count(rows: Sequence[Reference], holds: Callable[[Reference], bool]) -> int:
    return sum(map(holds, rows))
