"""Every metric by name: one answer and what it is judged by in, a number from 0 to 1 out.

    answer ──> behind the thought, in its <answer> tags ──> judged against each accepted answer ──> the best counts

The rewards of the same names (`train/reward_functions.py`) call the same functions. The lines `Range:`, `For:` and `Source:`
of the docstrings make the table in docs/evaluation.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lensmith.config.tree import BoxConvention
from lensmith.errors import MetricError
from lensmith.evals import box_answers, json_metrics, text_metrics
from lensmith.evals.answer_text import after_thought, extract_boxed, final_answer, has_shape
from lensmith.evals.choices import choice_match, read_options
from lensmith.evals.math_answers import math_equal
from lensmith.evals.normalise import exact_match, normalised_match

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Int

ANSWERS_COLUMN = "answers"
"""Column with several accepted answers: texts, or objects with the text under `answer`, as in VQAv2."""
OPTION_COLUMNS = ("options", "choices")
SCHEMA_COLUMN = "schema"


@dataclass(frozen=True, slots=True)
class Reference:
    """What one answer is judged by."""

    answers: tuple[str, ...]
    """Accepted ones, at least one."""
    question: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What else the row holds."""
    boxes: BoxConvention | None = None
    """How boxes are written in the answer and in the accepted ones, where the data says so."""

    @property
    def convention(self) -> BoxConvention:
        return self.boxes or box_answers.PLAIN

    @property
    def options(self) -> dict[str, str]:
        """Of a multiple choice by letter; empty where it is none."""
        return read_options(self.question, listed_options(self.columns))


class Corpus(Protocol):
    """A metric of a whole data set, over answers that it knows."""

    def value(self, chosen: Int[np.ndarray, " answers"], /) -> float: ...


@dataclass(frozen=True, slots=True)
class Metric:
    """One way to judge answers."""

    name: str
    judge: Callable[[str, Reference], float]
    """The value of one answer, 0 to 1."""
    lower_is_better: bool = False
    corpus: Callable[[Sequence[str], Sequence[Reference]], Corpus] | None = None
    """Of a metric that is no mean over answers; `judge` then tells which answers got better or worse."""
    needs: str | None = None
    """A package that comes with the extra of the metric's name."""

    def value(self, answer: str, reference: Reference) -> float:
        """`judge`, with a result that is none refused.

        Raises:
            MetricError: the result is no number from 0 to 1. Beyond that whatever `judge` raises.
        """
        value = self.judge(answer, reference)
        if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
            raise MetricError(f"returned {value!r}, a {type(value).__name__}, where a number from 0 to 1 is needed")
        if not 0 <= float(value) <= 1:  # nan is not
            raise MetricError(f"returned {value!r}, where a number from 0 to 1 is needed")
        return float(value)


def accepted_answers(answer: str, columns: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of the column `answers` where it is a list with something in it, else the row's own answer."""
    found = columns.get(ANSWERS_COLUMN)
    if isinstance(found, str) and found.lstrip().startswith("["):  # a table's cell
        try:
            found = json_metrics.read_json(found)
        except (ValueError, RecursionError):
            return (answer,)
    if isinstance(found, str | bytes | Mapping) or not hasattr(found, "__iter__"):
        return (answer,)
    texts = [one.get("answer") if isinstance(one, Mapping) else one for one in found or ()]
    return tuple(str(text) for text in texts if text is not None) or (answer,)


def listed_options(columns: Mapping[str, Any]) -> list[str] | None:
    """The texts of a column `options` or `choices`; None where there is none that is a list."""
    for name in OPTION_COLUMNS:
        found = columns.get(name)
        if isinstance(found, list | tuple) and found:
            return [str(one) for one in found]
    return None


def _exact(answer: str, reference: Reference) -> float:
    """The same text, letter by letter; only white space at the ends is ignored.

    Range: 0 or 1.
    For: code, markup, identifiers, several lines.
    Source: string equality.
    """
    return _best(exact_match, answer, reference)


def _normalised(answer: str, reference: Reference) -> float:
    """The same without case, punctuation, articles and number words.

    Range: 0 or 1.
    For: short answers.
    Source: [VQA evaluation](https://visualqa.org/evaluation.html), arXiv:1505.00468; the table below says what differs.
    """
    return _best(normalised_match, answer, reference)


def _boxed(answer: str, reference: Reference) -> float:
    """The last \\boxed{} behind the thought means the reference, as mathematics; without one the answer is wrong.

    Range: 0 or 1.
    For: mathematics.
    Source: [math-verify](https://github.com/huggingface/Math-Verify); \\boxed{} as in MATH, arXiv:2103.03874.
    """
    said = extract_boxed(after_thought(answer))
    return float(said is not None and any(math_equal(said, final_answer(one)) for one in reference.answers))


def _anls(answer: str, reference: Reference) -> float:
    """How near the spelling comes: 1 - normalised edit distance, and 0 from a distance of one half on.

    Range: 0, or above 0.5 to 1.
    For: text read off documents and scenes.
    Source: ANLS, arXiv:1907.00490, equation 1.
    """
    return _best(text_metrics.anls, answer, reference)


def _relaxed(answer: str, reference: Reference) -> float:
    """A number within 5 % of the reference; texts equal but for case.

    Range: 0 or 1.
    For: numbers read off charts; years are numbers to it too.
    Source: ChartQA's relaxed accuracy, arXiv:2203.10244.
    """
    return _best(text_metrics.relaxed_match, answer, reference)


def _vqa_soft(answer: str, reference: Reference) -> float:
    """min(matches / 3, 1) over the other people's answers, averaged over leaving out each person once.

    Range: 0 to 1.
    For: questions that ten people answered (column `answers`). Of two or three, all others must agree; of one, it decides.
    Source: [VQA evaluation](https://visualqa.org/evaluation.html), arXiv:1505.00468.
    """
    return text_metrics.vqa_soft(final_answer(answer), [final_answer(one) for one in reference.answers])


def _token_f1(answer: str, reference: Reference) -> float:
    """Harmonic mean of precision and recall over words, as `normalised` leaves them.

    Range: 0 to 1.
    For: answers of a few words to a sentence; it knows no synonyms.
    Source: SQuAD's F1, arXiv:1606.05250.
    """
    return _best(text_metrics.token_f1, answer, reference)


def _cer(answer: str, reference: Reference) -> float:
    """Character error rate: edits / characters of the reference, cut at 1; **lower is better**.

    Range: 0 to 1.
    For: transcription. The mean over questions; published rates often divide all edits by all characters instead.
    Source: Levenshtein 1966; Morris et al. 2004, Interspeech.
    """
    return min(text_metrics.char_error_rate(final_answer(answer), final_answer(one)) for one in reference.answers)


def _wer(answer: str, reference: Reference) -> float:
    """Word error rate: the same over words; **lower is better**.

    Range: 0 to 1.
    For: transcription, as above.
    Source: Morris et al. 2004, Interspeech.
    """
    return min(text_metrics.word_error_rate(final_answer(answer), final_answer(one)) for one in reference.answers)


def _iou(answer: str, reference: Reference) -> float:
    """Intersection over union, summed over the best one-to-one matching of boxes, divided by the longer list.

    Range: 0 to 1.
    For: boxes; labels do not count, and a box too many costs as one too few.
    Source: Everingham et al. 2010 (Pascal VOC), 4.2; matching as in DETR, arXiv:2005.12872, 3.1.
    """
    return _best(lambda said, meant: box_answers.answer_iou(said, meant, reference.convention), answer, reference)


def _iou_50(answer: str, reference: Reference) -> float:
    """Boxes matched one to one with an IoU of 0.5 or more, divided by the longer list.

    Range: 0 to 1; 0 or 1 for one box.
    For: grounding.
    Source: Acc@0.5 of RefCOCO, arXiv:1608.00272.
    """
    return _best(lambda said, meant: box_answers.answer_hits(said, meant, 0.5, reference.convention), answer, reference)


def _iou_75(answer: str, reference: Reference) -> float:
    """The same from an IoU of 0.75 on.

    Range: 0 to 1; 0 or 1 for one box.
    For: grounding where the edges matter.
    Source: as above; the threshold is COCO's, arXiv:1405.0312.
    """
    return _best(
        lambda said, meant: box_answers.answer_hits(said, meant, 0.75, reference.convention), answer, reference
    )


def _map(answer: str, reference: Reference) -> float:
    """Mean average precision over the whole data set, AP@[.5:.95], over labels; single answers by `iou`.

    Range: 0 to 1.
    For: detection with labels; a `confidence` beside a box counts, without one all are sure. Needs the extra `lensmith[map]`.
    Source: [COCO](https://cocodataset.org/#detection-eval), arXiv:1405.0312, by pycocotools.
    """
    return _iou(answer, reference)


def _point(answer: str, reference: Reference) -> float:
    """The one point of the answer, or the middle of its one box, lies in a box of the reference.

    Range: 0 or 1.
    For: clicking and pointing.
    Source: ScreenSpot, arXiv:2401.10935, section 4.
    """
    return _best(lambda said, meant: box_answers.point_hit(said, meant, reference.convention), answer, reference)


def _json_f1(answer: str, reference: Reference) -> float:
    """Harmonic mean of precision and recall over fields of JSON: key path and value; the order in lists does not count.

    Range: 0 to 1.
    For: forms, receipts, any extraction into JSON.
    Source: Donut's field-level F1, arXiv:2111.15664, 3.1, averaged over answers.
    """
    return _best(json_metrics.json_f1, answer, reference)


def _choice(answer: str, reference: Reference) -> float:
    """The answer means the same option: `B`, `(B)`, `B. Paris`, `The answer is B`, or the option's text.

    Range: 0 or 1.
    For: multiple choice; options are read from the question, or from a column `options` or `choices`.
    Source: after MMMU's evaluation, arXiv:2311.16502, but no letter found is wrong, not drawn.
    """
    options = reference.options
    return _best(lambda said, meant: choice_match(said, meant, options), answer, reference)


def _format(answer: str, reference: Reference) -> float:
    """The whole answer has the shape `<think>...</think><answer>...</answer>`, as the reward of that name pays.

    Range: 0 or 1.
    For: whether training for the shape worked; says nothing of what is answered.
    Source: DeepSeek-R1, arXiv:2501.12948, 2.2.2.
    """
    return float(has_shape(answer, "think_answer"))


def _json_schema(answer: str, reference: Reference) -> float:
    """The answer is JSON that fits the JSON Schema in the row's column `schema`, as the reward of that name pays.

    Range: 0 or 1.
    For: whether answers can be parsed; says nothing of their values.
    Source: [JSON Schema](https://json-schema.org), by jsonschema; addresses in `$ref` are never fetched.
    """
    found = reference.columns.get(SCHEMA_COLUMN)
    if found is None:
        raise MetricError(f"the row has no column {SCHEMA_COLUMN!r} with a JSON Schema")
    schema = json_metrics.checked_schema(json_metrics.read_json(found) if isinstance(found, str) else found)
    try:
        value = json_metrics.read_json(final_answer(answer))
    except (ValueError, RecursionError):
        return 0.0
    return float(json_metrics.fits_schema(value, schema))


def _best(judge: Callable[[str, str], float | bool], answer: str, reference: Reference) -> float:
    said = final_answer(answer)
    return max(float(judge(said, final_answer(one))) for one in reference.answers)


def _average_precision(answers: Sequence[str], references: Sequence[Reference]) -> Corpus:
    from lensmith.evals.mean_ap import AveragePrecision

    said, meant = [final_answer(one) for one in answers], [final_answer(one.answers[0]) for one in references]
    return AveragePrecision(said, meant, [one.convention for one in references])


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("exact", _exact),
        Metric("normalised", _normalised),
        Metric("boxed", _boxed),
        Metric("choice", _choice),
        Metric("anls", _anls),
        Metric("relaxed", _relaxed),
        Metric("vqa_soft", _vqa_soft),
        Metric("token_f1", _token_f1),
        Metric("cer", _cer, lower_is_better=True),
        Metric("wer", _wer, lower_is_better=True),
        Metric("iou", _iou),
        Metric("iou@0.5", _iou_50),
        Metric("iou@0.75", _iou_75),
        Metric("map", _map, corpus=_average_precision, needs="pycocotools"),
        Metric("point", _point),
        Metric("json_f1", _json_f1),
        Metric("json_schema", _json_schema),
        Metric("format", _format),
    )
}
"""Name in eval.metric -> the metric; `config/tree.py` lists the same names, without loading this."""
