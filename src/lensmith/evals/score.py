"""Scores of short answers with their uncertainty, pure: no model, no torch, no drawing of random numbers.

An answer is right or wrong, so a score is a proportion, its interval is Wilson's and two models that answered the same
questions are compared by McNemar's exact test. The intervals take the questions as independent; several questions about
one picture are a little less than that, so read them as slightly narrow.
"""

from __future__ import annotations

import math
import re
import statistics
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lensmith.errors import DataError
from lensmith.evals.answer_text import extract_boxed

Metric = Literal["exact", "normalised", "boxed"]

CONFIDENCE = 0.95
LONG_ANSWER_WORDS = 8
"""From here on a reference is prose, which no matching metric judges well; `guess_metric` says so."""

# The lists of the VQA evaluation, https://visualqa.org/evaluation.html (Antol et al., arXiv:1505.00468).
ARTICLES = frozenset({"a", "an", "the"})
_ZERO_TO_TEN = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBER_WORDS: dict[str, str] = {word: str(number) for number, word in enumerate(_ZERO_TO_TEN)} | {"none": "0"}

_APOSTROPHES = str.maketrans("", "", "'’`")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_NUMBER = re.compile(r"(?<!\w)-?\.?\d+(?:[.,:/-]\d+)*")
_MARKUP_START = ("{", "[", "<", "\\", "```")


def exact_match(answer: str, reference: str) -> bool:
    """Whether the two are the same text; only white space at the ends is ignored."""
    return answer.strip() == reference.strip()


def normalised_match(answer: str, reference: str) -> bool:
    """Whether the two say the same once `normalise` took case, punctuation, articles and number words away."""
    return normalise(answer) == normalise(reference)


def normalise(text: str) -> str:
    """The text as the VQA evaluation compares it: `"The two dogs."` -> `2 dogs`.

    Follows https://visualqa.org/evaluation.html: lower case, no punctuation, no articles, zero to ten (and none) as
    digits, apostrophes dropped. It departs from that script where the script makes different answers equal: signs,
    decimal points, ratios, dates and times inside numbers stay (`-5`, `0.5`, `1/2`, `10:30`); so do symbols that are
    not punctuation (`+`, `<`, `$`); and a text of articles or punctuation alone is kept, so that the choice `A` is not
    the same as no answer.
    """
    text = unicodedata.normalize("NFKC", text).casefold().replace("−", "-")
    text = _THOUSANDS.sub("", text.translate(_APOSTROPHES))
    words = _without_punctuation(text).split()
    kept = [NUMBER_WORDS.get(word, word) for word in words if word not in ARTICLES]
    return " ".join(kept or words or text.split())


def _without_punctuation(text: str) -> str:
    """Punctuation becomes a space, except inside numbers."""
    pieces, end = [], 0
    for number in _NUMBER.finditer(text):
        pieces += [_spaced(text[end : number.start()]), number.group()]
        end = number.end()
    return "".join([*pieces, _spaced(text[end:])])


def _spaced(text: str) -> str:
    # The percent sign is punctuation to Unicode but a unit to a reader: 5% is not 5.
    return "".join(c if c == "%" or not unicodedata.category(c).startswith("P") else " " for c in text)


def boxed_match(answer: str, reference: str) -> bool:
    """Whether the last \\boxed{} of the answer means the reference; an answer without one is wrong."""
    from lensmith.evals.math_answers import math_equal  # which compares words by this module's normalise

    boxed = extract_boxed(answer)
    return boxed is not None and math_equal(boxed, reference)


MATCHERS = {"exact": exact_match, "normalised": normalised_match, "boxed": boxed_match}


@dataclass(frozen=True, slots=True)
class Score:
    """A share of right answers with its 95 % interval."""

    metric: Metric
    value: float
    """Right answers / questions, 0 to 1."""
    low: float
    high: float
    n: int
    """Questions."""

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%}, n={self.n:,})"


@dataclass(frozen=True, slots=True)
class Comparison:
    """The same questions answered twice."""

    wins: int
    """Wrong before, right after."""
    losses: int
    """Right before, wrong after."""
    ties: int
    p_value: float
    """Chance of wins and losses at least this uneven if both were equally good."""

    @property
    def sentence(self) -> str:
        """What changed, in words."""
        chance = "< 0.0001" if self.p_value < 1e-4 else f"= {self.p_value:.2g}"
        return (
            f"Of {self.wins + self.losses + self.ties:,} questions, {self.wins:,} wrong answers became right and "
            f"{self.losses:,} right ones became wrong (p {chance}, McNemar's exact test)."
        )


def score_answers(answers: Sequence[str], references: Sequence[str], metric: Metric) -> Score:
    """Share of answers that match their reference, with a 95 % interval.

    Raises:
        DataError: there is nothing to score, or not one answer per reference.
    """
    right = judge_answers(answers, references, metric)
    low, high = wilson_interval(sum(right), len(right))
    return Score(metric, sum(right) / len(right), low, high, len(right))


def judge_answers(answers: Sequence[str], references: Sequence[str], metric: Metric) -> list[bool]:
    """Right or wrong, answer by answer.

    Raises:
        DataError: there is nothing to score, or not one answer per reference.
    """
    if not references or len(answers) != len(references):
        raise DataError(
            f"scoring: {len(answers)} answers for {len(references)} references. "
            "Each question needs one of each: check that data.test names rows with answers."
        )
    return [MATCHERS[metric](answer, reference) for answer, reference in zip(answers, references, strict=True)]


def wilson_interval(right: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval of a proportion: stays inside 0 to 1 and holds near both ends.

    Wilson 1927, J. Am. Stat. Assoc. 22; recommended over the textbook interval by Brown, Cai and DasGupta 2001.
    """
    z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
    share = right / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At both ends the formula is exact in algebra only; rounding leaves 1e-17 on either side.
    return 0.0 if right == 0 else (centre - spread) / scale, 1.0 if right == n else (centre + spread) / scale


def compare_answers(
    before: Sequence[str], after: Sequence[str], references: Sequence[str], metric: Metric
) -> Comparison:
    """The same questions before and after training, pair by pair.

    Raises:
        DataError: there is nothing to compare, or not two answers per reference.
    """
    pairs = list(zip(judge_answers(before, references, metric), judge_answers(after, references, metric), strict=True))
    wins, losses = pairs.count((False, True)), pairs.count((True, False))
    return Comparison(wins, losses, len(pairs) - wins - losses, mcnemar_p_value(wins, losses))


def mcnemar_p_value(wins: int, losses: int) -> float:
    """Two-sided exact p-value of McNemar's test (Psychometrika 12, 1947): ties say nothing, the rest is a fair coin.

    Exact integers throughout; underflows to 0.0 below 1e-308.
    """
    n = wins + losses
    tail, term = 0, 1
    for k in range(min(wins, losses) + 1):
        tail += term
        term = term * (n - k) // (k + 1)  # the next binomial coefficient; the division leaves no rest
    return min(1.0, 2 * tail / 2**n)


def guess_metric(references: Sequence[str]) -> tuple[Metric, str]:
    """The metric that suits these reference answers, and the sentence that says why.

    Raises:
        DataError: there are no references.
    """
    if not references:
        raise DataError("scoring: 0 references. Name rows with answers in data.test.")
    n = len(references)
    structured = sum(
        reference.lstrip().startswith(_MARKUP_START) or "\n" in reference.strip() for reference in references
    )
    if 2 * structured > n:
        return "exact", (
            f"metric exact: {structured:,} of {n:,} answers are code, markup or several lines, "
            "where case and punctuation count"
        )
    words = statistics.median(len(reference.split()) for reference in references)
    if words >= LONG_ANSWER_WORDS:
        return "normalised", (
            f"metric normalised, but half of the {n:,} answers have {words:g} words or more: "
            "few sentences match word by word, so read the kept predictions too"
        )
    return "normalised", (
        f"metric normalised: short answers (half have {words:g} or fewer words), compared without "
        "case, punctuation and articles"
    )
