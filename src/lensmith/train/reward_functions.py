"""The rewards that come with Lensmith, by name: one completion and its row in, one number out.

Each reads the answer where `evals.answer_text` finds it, so a thought never scores, and compares it with the row's answer
or with the column that its parameter `column` names. Where that holds a list, the best of its references counts. The
lines `Reads:`, `Range:` and `Source:` of the docstrings make the table in docs/rewards.md.

Boxes are compared as the model speaks them: samples come converted, as `data.boxes.convert_sample` leaves them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from lensmith.errors import RewardError
from lensmith.evals.answer_text import Read, Shape, after_thought, extract_boxed, final_answer, has_shape, read_answer
from lensmith.evals.box_answers import read_marked, read_targets
from lensmith.evals.box_metrics import box_iou, centre_of, contains_point, matched_iou
from lensmith.evals.json_metrics import checked_schema, fits_schema, read_json
from lensmith.evals.math_answers import math_equal
from lensmith.evals.normalise import exact_match, normalised_match
from lensmith.evals.text_metrics import ANLS_THRESHOLD, RELAXED_TOLERANCE, anls, relaxed_match, repeated_share
from lensmith.types import Sample

Unit = Annotated[float, Field(ge=0, le=1)]

LARGEST_SCALE = 1000
"""Where Qwen3-VL's boxes end; a reference beyond it was not converted."""
CACHE_SHARE = 5
"""DAPO punishes softly over the last fifth of what a completion may have: 4,096 of 20,480 tokens, arXiv:2503.14476, 4.1."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What one reward sees at a time."""

    text: str
    ids: Sequence[int]
    """Its tokens, the end mark included."""
    sample: Sample
    truncated: bool
    """Whether it ended because it reached the most tokens it could have."""


RewardFunction = Callable[..., float]
"""(completion: Completion, **parameters) -> a finite number."""


def find_column(sample: Sample, column: str) -> Any:
    """What the row holds in that column.

    Raises:
        RewardError: it has no such column, or nothing in it.
    """
    if sample.columns.get(column) is None:
        held = ", ".join(sample.columns) or "none besides the messages"
        raise RewardError(
            f"{sample.where}: column {column!r} is asked for, but the row's columns are: {held}. "
            "Add it to the rows, or let the reward read one that they have."
        )
    return sample.columns[column]


def find_answer(sample: Sample) -> Any:
    """The row's last turn by the assistant, or else its column `answer`.

    Raises:
        RewardError: it has neither.
    """
    return sample.answer or find_column(sample, "answer")


def math_boxed(
    completion: Completion,
    *,
    missing: float = -1.0,
    wrong: float = -0.5,
    right: float = 1.0,
    column: str | None = None,
) -> float:
    """Whether the last \\boxed{} holds the answer, as mathematics: `\\frac12` is `0.5`.

    Reads: the last `\\boxed{}` or `\\fbox{}` behind the thought; one that never closes is missing.
    Range: `missing` without a box, `wrong` or `right` with one.
    Source: [math-verify](https://github.com/huggingface/Math-Verify); \\boxed{} as in MATH, arXiv:2103.03874.
    """
    said = extract_boxed(after_thought(completion.text))
    if said is None:
        return missing
    return right if any(math_equal(said, reference) for reference in _references(completion, column)) else wrong


def exact(completion: Completion, *, read: Read = "final", column: str | None = None) -> float:
    """Whether the answer is the reference, letter by letter; only white space at the ends is ignored.

    Reads: the answer behind the thought; `read` says more.
    Range: 0 or 1.
    Source: `evals/normalise.py`.
    """
    return _best(completion, read, column, exact_match)


def normalised(completion: Completion, *, read: Read = "final", column: str | None = None) -> float:
    """Whether the two say the same without case, punctuation, articles and number words.

    Reads: the answer behind the thought; `read` says more.
    Range: 0 or 1.
    Source: [VQA evaluation](https://visualqa.org/evaluation.html), arXiv:1505.00468.
    """
    return _best(completion, read, column, normalised_match)


def anls_score(
    completion: Completion, *, threshold: Unit = ANLS_THRESHOLD, read: Read = "final", column: str | None = None
) -> float:
    """How near the answer's spelling comes; 0 from a normalised edit distance of `threshold` on.

    Reads: the answer behind the thought; `read` says more.
    Range: 0, or from 1 - `threshold` to 1.
    Source: ANLS, arXiv:1907.00490, equation 1.
    """
    return _best(completion, read, column, lambda said, reference: anls(said, reference, threshold))


def relaxed_number(
    completion: Completion, *, tolerance: Unit = RELAXED_TOLERANCE, read: Read = "final", column: str | None = None
) -> float:
    """Whether a number is within `tolerance` of the reference; texts must be equal but for case.

    Reads: the answer behind the thought; `read` says more.
    Range: 0 or 1.
    Source: ChartQA's relaxed accuracy, arXiv:2203.10244.
    """
    return _best(completion, read, column, lambda said, reference: relaxed_match(said, reference, tolerance))


def iou(completion: Completion, *, threshold: Unit | None = None, column: str | None = None) -> float:
    """How well the one box in the answer covers the row's one box; several boxes, or none, score 0.

    Reads: boxes behind the thought, in any writing of [boxes](boxes.md); the row's as the model speaks.
    Range: 0 to 1; with `threshold`, 1 from that IoU on, else 0.
    Source: Pascal VOC, Everingham et al. 2010, section 4.2; as a reward arXiv:2503.01785 (Visual-RFT).
    """
    references = _reference_boxes(completion.sample, column)
    if len(references) != 1:
        raise RewardError(
            f"{completion.sample.where}: iou compares 1 box with 1 box, but the row has {len(references)}. "
            "Use iou_match for such rows."
        )
    said = read_marked(final_answer(completion.text), "box")
    overlap = box_iou(said[0], references[0]) if len(said) == 1 else 0.0
    return overlap if threshold is None else float(overlap >= threshold)


def iou_match(completion: Completion, *, column: str | None = None) -> float:
    """IoU over the best one-to-one matching of boxes, divided by the longer list; a box too many costs as one too few.

    Reads: boxes behind the thought, in any writing of [boxes](boxes.md); the row's as the model speaks.
    Range: 0 to 1.
    Source: matching as in DETR, arXiv:2005.12872, section 3.1, by Jonker and Volgenant's method (1987).
    """
    return matched_iou(read_marked(final_answer(completion.text), "box"), _reference_boxes(completion.sample, column))


def point_in_box(completion: Completion, *, column: str | None = None) -> float:
    """Whether the one point in the answer, or the middle of its one box, lies in one of the row's boxes.

    Reads: points and boxes behind the thought; a whole answer `[x, y]` or `(x, y)` too.
    Range: 0 or 1.
    Source: ScreenSpot's click accuracy, arXiv:2401.10935 (SeeClick), section 4.
    """
    said = read_targets(final_answer(completion.text))
    references = _reference_boxes(completion.sample, column)
    return float(len(said) == 1 and any(contains_point(box, centre_of(said[0])) for box in references))


def format_tags(completion: Completion, *, shape: Shape = "think_answer", opened: bool = False) -> float:
    """Whether the completion has the shape: `think_answer`, `answer` (tags, nothing outside), or `boxed` (one \\boxed{}).

    With `opened`, the prompt has opened <think> already, as that of the Thinking checkpoints does.

    Reads: the whole completion, not the row.
    Range: 0 or 1.
    Source: tags as in DeepSeek-R1, arXiv:2501.12948, 2.2.2.
    """
    return float(has_shape(f"<think>{completion.text}" if opened else completion.text, shape))


Schema = Annotated[Mapping[str, Any], AfterValidator(checked_schema)]


def json_schema(
    completion: Completion,
    *,
    schema: Schema | None = None,
    column: str = "schema",
    broken: float = 0.0,
    mismatch: float = 0.0,
    valid: float = 1.0,
) -> float:
    """Whether the answer is JSON that fits a schema: `schema`, or the row's `column` (an object, or its text).

    Reads: the answer behind the thought, with or without code fences.
    Range: `broken` where it is no JSON, `mismatch` where it does not fit, `valid` where it does.
    Source: [JSON Schema](https://json-schema.org), by jsonschema; addresses in `$ref` are never fetched.
    """
    from referencing.exceptions import Unresolvable

    rules = schema if schema is not None else _schema_of(completion.sample, column)
    try:
        value = read_json(final_answer(completion.text))
    except (ValueError, RecursionError):  # a text of brackets alone nests deeper than any reader
        return broken
    try:
        return valid if fits_schema(value, rules) else mismatch
    except Unresolvable as cause:
        raise RewardError(
            f"{completion.sample.where}: the schema refers to {cause.ref!r}, which is not in it, and nothing is fetched. "
            "Put what it names under `$defs` of the schema itself."
        ) from cause


def length(
    completion: Completion,
    *,
    max_tokens: Annotated[int, Field(ge=1)],
    cache_tokens: Annotated[int, Field(ge=0)] | None = None,
) -> float:
    """Nothing up to `max_tokens` - `cache_tokens` tokens, then falling evenly to -1 at `max_tokens` and for cut ones.

    Set `max_tokens` to the run's own limit. Null `cache_tokens`: a fifth of it.

    Reads: the number of tokens, and whether the completion was cut; not the row.
    Range: -1 to 0.
    Source: soft overlong punishment, DAPO, arXiv:2503.14476, equation 13.
    """
    cache = max_tokens // CACHE_SHARE if cache_tokens is None else min(cache_tokens, max_tokens)
    over = len(completion.ids) - (max_tokens - cache)
    if completion.truncated or over > cache:
        return -1.0
    return -over / cache if over > 0 else 0.0


def repetition(
    completion: Completion, *, ngram: Annotated[int, Field(ge=1)] = 3, penalty: Annotated[float, Field(le=0)] = -1.0
) -> float:
    """`penalty` times the share of token n-grams that occurred before in the completion.

    Reads: the tokens, not the row.
    Range: `penalty` to 0.
    Source: repetition penalty, arXiv:2502.03373, appendix C.2, over the whole completion as TRL has it.
    """
    return penalty * repeated_share(completion.ids, ngram) + 0.0  # + 0.0: no reward of -0


REWARDS: Mapping[str, RewardFunction] = {
    "math_boxed": math_boxed,
    "exact": exact,
    "normalised": normalised,
    "anls": anls_score,
    "relaxed_number": relaxed_number,
    "iou": iou,
    "iou_match": iou_match,
    "point_in_box": point_in_box,
    "format": format_tags,
    "json_schema": json_schema,
    "length": length,
    "repetition": repetition,
}
"""Name in `rewards` -> the function; its keyword-only arguments are the parameters of the setting."""


def _best(completion: Completion, read: Read, column: str | None, judge: Callable[[str, str], float | bool]) -> float:
    references = _references(completion, column)
    said = read_answer(completion.text, read)
    return 0.0 if said is None else max(float(judge(said, reference)) for reference in references)


def _references(completion: Completion, column: str | None) -> list[str]:
    sample = completion.sample
    found = find_answer(sample) if column is None else find_column(sample, column)
    several = list(found) if isinstance(found, Iterable) and not isinstance(found, str | Mapping) else [found]
    if not several:
        raise RewardError(
            f"{sample.where}: column {column or 'answer'!r} is a list of 0 references, and at least 1 is needed to compare "
            "with. Fill it, or leave the row out."
        )
    return [str(one) for one in several]


def _reference_boxes(sample: Sample, column: str | None) -> list[tuple[float, ...]]:
    found = find_answer(sample) if column is None else find_column(sample, column)
    text = found if isinstance(found, str) else json.dumps(found, default=_listed)
    boxes = read_marked(text, "box")
    beyond = [box for box in boxes if not all(0 <= number <= LARGEST_SCALE for number in box)]
    if beyond and (sample.boxes is None or sample.boxes.target == "xyxy_1000"):
        raise RewardError(
            f"{sample.where}: the box {[round(number, 2) for number in beyond[0]]} reaches beyond 0 to {LARGEST_SCALE}, "
            "which answers are compared in. Say with data.boxes how boxes are written in the data."
        )
    if not boxes:
        raise RewardError(
            f"{sample.where}: 0 boxes in {column or 'answer'!r}, and at least 1 is needed to compare with; it begins "
            f"{text[:60]!r}. Write boxes as docs/boxes.md shows, or name another column."
        )
    return boxes


def _listed(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy, as parquet files give lists
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no box")


def _schema_of(sample: Sample, column: str) -> Mapping[str, Any]:
    found = find_column(sample, column)
    try:
        return checked_schema(json.loads(found) if isinstance(found, str) else found)
    except ValueError as cause:
        raise RewardError(
            f"{sample.where}: column {column!r} {cause}. Mend it, or set the reward's `schema`."
        ) from cause
