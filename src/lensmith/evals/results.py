"""Answers of a model, as kept in predictions-*.jsonl, and what they are worth: no model, so they can be scored again.

Prediction ──> Reference ──> one value per answer ──> EvalResult ──> compare_results(before, after)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lensmith.config.tree import BoxConvention, Eval
from lensmith.evals.guess import guess_metric
from lensmith.evals.metrics import Metric, Reference, accepted_answers
from lensmith.evals.own_metrics import load_metric
from lensmith.evals.score import Comparison, Judged, Score, compare_judged, judge_answers, score_answers, score_judged
from lensmith.types import ImageSize, Sample

MOST_COLUMN_CHARACTERS = 20_000
"""A column longer than this, as JSON, is not kept with the answers: a document, or a picture as text."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """One question and what the model answered; one line of predictions-*.jsonl."""

    where: str
    question: str
    reference: str
    """The answer in the data; empty where there is none."""
    answer: str
    """Without special tokens and with boxes as the data writes them, otherwise as generated."""
    tokens: int
    """Generated, without the end mark."""
    stopped: bool
    """Whether the model ended its answer itself; False where max_new_tokens cut it off."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What else the row held, as far as JSON can say it: metrics and breakdowns read it."""
    boxes: BoxConvention | None = None
    """How boxes are written in the data, where that is known."""
    image_px: tuple[int, int] | None = None
    """Height and width of the first picture, upright; None without one, and for a video."""

    @property
    def judged_by(self) -> Reference:
        """What the answer is compared with."""
        return Reference(accepted_answers(self.reference, self.columns), self.question, self.columns, self.boxes)


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Scores of one model on one set of questions, and every answer behind them."""

    metric: str
    why: str
    """A sentence: how the metric was chosen."""
    score: Score
    """By the chosen metric."""
    exact: Score
    normalised: Score
    predictions: tuple[Prediction, ...]
    judged: Judged
    """One value per prediction, by the chosen metric."""
    eval_s: float

    def score_of(self, chosen: Sequence[int]) -> Score:
        """The score of some of the questions only, by the chosen metric."""
        return score_judged(self.judged, chosen)

    @property
    def values(self) -> list[float]:
        """What each answer is worth by the chosen metric, 0 to 1."""
        return self.judged.values.tolist()

    @property
    def failure(self) -> str | None:
        """How many answers the metric could not judge, with the first of them; None where it judged all."""
        return self.judged.failure_sentence([prediction.where for prediction in self.predictions])

    @property
    def cut_off(self) -> int:
        """Answers that max_new_tokens cut off."""
        return sum(not prediction.stopped for prediction in self.predictions)


def predict(sample: Sample, sizes: Sequence[ImageSize], answer: str, tokens: int, stopped: bool) -> Prediction:
    """What one sample was asked and answered; `sizes` of its pictures, as its prompt has them."""
    pictures = [image for image in sizes if not sample.videos or image.ref in sample.images]
    return Prediction(
        sample.where,
        sample.question,
        sample.answer,
        answer,
        tokens,
        stopped,
        kept_columns(sample.columns),
        None if sample.boxes is None else sample.boxes.convention,
        pictures[0].original_px if pictures else None,
    )


def kept_columns(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that JSON can say, in at most MOST_COLUMN_CHARACTERS each; bytes and pictures are left out."""
    kept = {}
    for name, value in columns.items():
        try:
            text = json.dumps(value, ensure_ascii=False, default=_plain)
        except (TypeError, ValueError):
            continue
        if len(text) <= MOST_COLUMN_CHARACTERS:
            kept[name] = json.loads(text)
    return kept


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy, as parquet files give lists and numbers
        return value.tolist()
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} is not JSON")


def score_predictions(predictions: Sequence[Prediction], settings: Eval, *, eval_s: float = 0.0) -> EvalResult:
    """Score answers that are there already, for example those that `read_predictions` returns.

    Raises:
        DataError: there are none, or the metric can judge nothing.
        ConfigError: eval.metric names what does not exist.
    """
    answers, references = [p.answer for p in predictions], [p.judged_by for p in predictions]
    metric, why = choose_metric(references, settings.metric)
    judged = judge_answers(answers, references, metric)
    exact, normalised = (score_answers(answers, references, name) for name in ("exact", "normalised"))
    score = {"exact": exact, "normalised": normalised}.get(metric.name) or score_judged(judged)
    return EvalResult(metric.name, why, score, exact, normalised, tuple(predictions), judged, eval_s)


def choose_metric(references: Sequence[Reference], asked: str) -> tuple[Metric, str]:
    """The metric that eval.metric asks for, or that `auto` guesses from the data, and the sentence that says which and why."""
    if asked == "auto":
        name, why = guess_metric(references)
        return load_metric(name), why
    several = sum(len(reference.answers) > 1 for reference in references)
    told = (
        f"; {several:,} of {len(references):,} rows have several accepted answers (column answers)" if several else ""
    )
    return load_metric(asked), f"metric {asked}: set by eval.metric{told}"


def compare_results(before: EvalResult, after: EvalResult) -> Comparison:
    """Wins and losses of `after` over `before`, question by question, by the metric of `before`."""
    metric, judged = before.judged.metric, after.judged
    if judged.metric.name != metric.name:
        judged = judge_answers(judged.answers, judged.references, metric)
    return compare_judged(before.judged, judged)


def write_predictions(predictions: Sequence[Prediction], path: Path) -> None:
    """One JSON object per line, in the order of the samples; `read_predictions` reads it back."""
    lines = (json.dumps(asdict(prediction), ensure_ascii=False) for prediction in predictions)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_predictions(path: Path) -> list[Prediction]:
    """What `write_predictions` wrote, also before it kept columns, boxes and sizes."""
    with path.open(encoding="utf-8") as lines:  # not splitlines(): an answer may hold other kinds of line ends
        return [_read(json.loads(line)) for line in lines]


def _read(fields: dict[str, Any]) -> Prediction:
    size = fields.pop("image_px", None)
    return Prediction(**fields, image_px=None if size is None else tuple(size))
