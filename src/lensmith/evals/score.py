"""Scores of answers with their uncertainty, and comparisons of two models over the same questions; pure, no model, no torch.

    answers ──> one value each, by a metric ──> Score: mean with its 95 % interval
    two of them over the same questions     ──> Comparison: better, worse, by how much, and whether chance explains it

Where every value is 0 or 1 the score is a proportion: Wilson's interval, McNemar's exact test, Newcombe's interval of the
difference. Else they are bootstrapped and their signs flipped (`intervals.py`). A corpus metric (`map`) is computed anew from
resampled and from swapped questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from lensmith.config.suggest import suggest_choice
from lensmith.errors import ConfigError, DataError, LensmithError
from lensmith.evals.guess import guess_metric
from lensmith.evals.intervals import (
    TIE,
    bootstrap_interval,
    mcnemar_p_value,
    newcombe_interval,
    sign_flip_p_value,
    statistic_interval,
    wilson_interval,
)
from lensmith.evals.metrics import METRICS, Corpus, Metric, Reference
from lensmith.evals.normalise import exact_match, normalise, normalised_match
from lensmith.types import counted

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = [
    "Comparison",
    "Judged",
    "Score",
    "compare_answers",
    "compare_judged",
    "exact_match",
    "guess_metric",
    "judge_answers",
    "mcnemar_p_value",
    "normalise",
    "normalised_match",
    "score_answers",
    "score_judged",
    "wilson_interval",
]

CORPUS_RESAMPLES = 300
"""Of a corpus metric, each through the whole data set again; the ends of its interval move by about 6 % of its width."""
MCNEMAR, SIGN_FLIPS = "McNemar's exact test", "paired randomisation test"
SEED = 0
"""Of resamples: the same answers give the same interval."""


@dataclass(frozen=True, slots=True)
class Score:
    """A mean over questions with its 95 % interval."""

    metric: str
    value: float
    """Of right-or-wrong metrics right answers / questions; 0 to 1."""
    low: float
    high: float
    n: int
    """Questions."""
    lower_is_better: bool = False
    """Of error rates."""

    def __str__(self) -> str:
        told = ", lower is better" if self.lower_is_better else ""
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%}, n={self.n:,}{told})"

    def is_better_than(self, value: float) -> bool:
        """Whether this one is better than another value of the same metric, whichever direction that is; equal ones are not."""
        return self.value < value if self.lower_is_better else self.value > value


@dataclass(frozen=True, slots=True)
class Comparison:
    """The same questions answered twice."""

    wins: int
    """Wrong before, right after; of graded metrics better after, by more than `intervals.TIE`."""
    losses: int
    """Right before, wrong after, or worse after."""
    ties: int
    p_value: float
    """Chance of a difference at least this large if both were equally good."""
    difference: float
    """Score after - score before; negative is better where lower is better."""
    low: float
    """Of its 95 % interval."""
    high: float
    metric: str = "normalised"
    test: str = MCNEMAR
    lower_is_better: bool = False

    @property
    def sentence(self) -> str:
        """What changed, in words."""
        chance = "< 0.0001" if self.p_value < 1e-4 else f"= {self.p_value:.2g}"
        questions = self.wins + self.losses + self.ties
        if self.test == MCNEMAR:
            changed = f"{self.wins:,} wrong answers became right and {self.losses:,} right ones became wrong"
        else:
            direction = ", of which less is better" if self.lower_is_better else ""
            changed = f"{self.wins:,} answers became better and {self.losses:,} worse by {self.metric}{direction}"
        return f"Of {questions:,} questions, {changed} (p {chance}, {self.test})."

    @property
    def difference_sentence(self) -> str:
        """By how much, with its interval, in words."""
        points = (f"{100 * number:+.1f}" for number in (self.difference, self.low, self.high))
        return "The score changed by {} points (95 % interval {} to {}).".format(*points)


@dataclass(frozen=True)
class Judged:
    """Answers with one value each."""

    metric: Metric
    answers: Sequence[str]
    references: Sequence[Reference]
    values: Float[np.ndarray, " answers"]
    """0 to 1. An answer that the metric could not judge has the worst of them."""
    failures: tuple[tuple[int, str], ...] = ()
    """Which answers those are, and what went wrong."""

    @cached_property
    def corpus(self) -> Corpus | None:
        """What a corpus metric knows about these answers; None for the mean of the values."""
        return None if self.metric.corpus is None else self.metric.corpus(self.answers, self.references)

    def failure_sentence(self, wheres: Sequence[str]) -> str | None:
        """How many answers could not be judged, and the first of them; None where all could."""
        if not self.failures:
            return None
        number, reason = self.failures[0]
        return (
            f"metric {self.metric.name} failed for {len(self.failures):,} of {counted(len(self.values), 'answer')}, which "
            f"count as {float(self.metric.lower_is_better):g}; the first: {wheres[number]}: {reason}"
        )


def judge_answers(answers: Sequence[str], references: Sequence[str | Reference], metric: str | Metric) -> Judged:
    """One value per answer.

    What a metric raises is kept with the answer's number, never dropped.

    Raises:
        DataError: there is nothing to score, not one answer per reference, or the metric can judge nothing.
        ConfigError: there is no metric of that name.
    """
    if not references or len(answers) != len(references):
        raise DataError(
            f"scoring: {len(answers)} answers for {len(references)} references. "
            "Each question needs one of each: check that data.test names rows with answers."
        )
    metric = find_metric(metric) if isinstance(metric, str) else metric
    meant = [Reference((one,)) if isinstance(one, str) else one for one in references]
    values = np.full(len(answers), float(metric.lower_is_better))
    failures: list[tuple[int, str]] = []
    for number, (answer, reference) in enumerate(zip(answers, meant, strict=True)):
        try:
            values[number] = metric.value(answer, reference)
        except Exception as cause:  # noqa: BLE001  (whatever a user's function raises: told by the answer's number)
            failures.append((number, _reason(cause)))
    if len(failures) == len(answers) and not _judges_references(metric, meant[0]):
        raise DataError(
            f"metric {metric.name}: it could judge 0 of {counted(len(answers), 'answer')}, nor the reference itself; "
            f"the first: {failures[0][1].rstrip('.')}. Mend the metric or the rows, or choose another eval.metric."
        )
    return Judged(metric, answers, meant, values, tuple(failures))


def _judges_references(metric: Metric, reference: Reference) -> bool:
    """Whether the metric works at all: a model that has learned nothing may well give answers that none can be judged of."""
    try:
        metric.value(reference.answers[0], reference)
    except Exception:  # noqa: BLE001  (as in judge_answers, which has its reason)
        return False
    return True


def find_metric(name: str) -> Metric:
    """The metric of that name; those of a user's own files come from `own_metrics.load_metric`.

    Raises:
        ConfigError: there is none, or what it needs is not installed.
    """
    if name not in METRICS:
        near = suggest_choice(name, tuple(METRICS))
        raise ConfigError(f"eval.metric: there is no metric {name!r} among {', '.join(METRICS)}. {near}".strip())
    metric = METRICS[name]
    if metric.needs is not None and find_spec(metric.needs) is None:
        raise ConfigError(
            f"eval.metric={name} needs {metric.needs}, which is not installed. Install it with: pip install "
            f"'lensmith[{name}]', or choose another metric."
        )
    return metric


def score_answers(answers: Sequence[str], references: Sequence[str | Reference], metric: str | Metric) -> Score:
    """The mean value of the answers, with a 95 % interval.

    Raises:
        DataError, ConfigError: as `judge_answers`.
    """
    return score_judged(judge_answers(answers, references, metric))


def score_judged(judged: Judged, chosen: Sequence[int] | None = None) -> Score:
    """The score of all answers, or of some of them by number.

    Raises:
        DataError: none are chosen.
    """
    rows = np.arange(len(judged.values)) if chosen is None else np.asarray(chosen, dtype=np.int64)
    if not len(rows):
        raise DataError("scoring: 0 answers are chosen, and a score needs at least 1. Choose some questions.")
    if judged.corpus is None:
        value, low, high = _mean_score(judged.values[rows])
    else:
        value, (low, high) = _corpus_score(judged, rows)
    return Score(judged.metric.name, value, low, high, len(rows), judged.metric.lower_is_better)


def _mean_score(values: Float[np.ndarray, " answers"]) -> tuple[float, float, float]:
    if _is_right_or_wrong(values):
        right = int(values.sum())
        return right / len(values), *wilson_interval(right, len(values))
    return float(values.mean()), *bootstrap_interval(values, seed=SEED)


def _corpus_score(judged: Judged, rows: Int[np.ndarray, " answers"]) -> tuple[float, tuple[float, float]]:
    assert judged.corpus is not None
    value = judged.corpus.value(rows)
    if np.isnan(value):  # a group without a single reference
        return 0.0, (0.0, 1.0)
    corpus = judged.corpus
    interval = statistic_interval(
        lambda drawn: corpus.value(rows[drawn]), len(rows), resamples=CORPUS_RESAMPLES, seed=SEED
    )
    return value, interval


def compare_answers(
    before: Sequence[str], after: Sequence[str], references: Sequence[str | Reference], metric: str | Metric
) -> Comparison:
    """The same questions before and after training, pair by pair.

    Raises:
        DataError, ConfigError: as `judge_answers`.
    """
    return compare_judged(judge_answers(before, references, metric), judge_answers(after, references, metric))


def compare_judged(before: Judged, after: Judged) -> Comparison:
    """The same for answers that have their values already, by one metric.

    Raises:
        DataError: not two answers per question.
    """
    if len(before.values) != len(after.values):
        raise DataError(
            f"comparing: {len(before.values)} answers before and {len(after.values)} after. Each question needs one of each: "
            "ask the same questions both times."
        )
    changes = after.values - before.values
    better = -changes if after.metric.lower_is_better else changes
    wins, losses = int((better > TIE).sum()), int((better < -TIE).sum())
    if before.corpus is not None:
        test, p_value, difference, low, high = _compare_corpora(before, after)
    elif _is_right_or_wrong(before.values) and _is_right_or_wrong(after.values):
        test, p_value = MCNEMAR, mcnemar_p_value(wins, losses)
        both = int((before.values * after.values).sum())
        gained, lost = int((changes > TIE).sum()), int((changes < -TIE).sum())
        low, high = newcombe_interval(both, gained, lost, len(changes) - both - gained - lost)
        difference = float(changes.mean())
    else:
        test, p_value = SIGN_FLIPS, sign_flip_p_value(changes, seed=SEED)
        low, high = bootstrap_interval(changes, seed=SEED)
        difference = float(changes.mean())
    ties = len(changes) - wins - losses
    direction = after.metric.lower_is_better
    return Comparison(wins, losses, ties, p_value, difference, low, high, after.metric.name, test, direction)


def _compare_corpora(before: Judged, after: Judged) -> tuple[str, float, float, float, float]:
    """Test, p-value, difference and its interval of a corpus metric: pairs are drawn, and swapped, together."""
    assert before.metric.corpus is not None
    n = len(before.values)
    corpus = before.metric.corpus([*before.answers, *after.answers], [*before.references, *after.references])
    rows = np.arange(n)
    difference = corpus.value(n + rows) - corpus.value(rows)

    def change(drawn: Int[np.ndarray, " answers"]) -> float:
        return corpus.value(n + drawn) - corpus.value(drawn)

    low, high = statistic_interval(change, n, resamples=CORPUS_RESAMPLES, seed=SEED)
    generator = np.random.default_rng(SEED)
    reached = 0
    for _ in range(CORPUS_RESAMPLES):
        swapped = n * generator.integers(0, 2, size=n)
        reached += abs(corpus.value(n - swapped + rows) - corpus.value(swapped + rows)) >= abs(difference) - TIE
    return SIGN_FLIPS, (1 + reached) / (1 + CORPUS_RESAMPLES), difference, low, high


def _is_right_or_wrong(values: Float[np.ndarray, " answers"]) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def _reason(cause: Exception) -> str:
    return str(cause) if isinstance(cause, LensmithError | ValueError) else f"{type(cause).__name__}: {cause}"
