"""Metrics of texts between 0 and 1, pure: one answer, one reference or several, one number."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence

from lensmith.evals.normalise import normalise

ANLS_THRESHOLD = 0.5
"""Biten et al., arXiv:1907.00490: an answer that differs in half its characters or more is wrong, not misread."""
RELAXED_TOLERANCE = 0.05
"""Masry et al. (ChartQA), arXiv:2203.10244: what is read off an axis may be 5 % off."""
VQA_MATCHES = 3
"""Antol et al., arXiv:1505.00468: an answer is fully right once so many people gave it."""

_NUMBER = re.compile(
    r"(?P<sign>[-+]?)[$€£¥]?(?P<digits>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?P<power>(?:[eE][-+]?\d+)?)(?P<percent>%?)"
)


def anls(answer: str, reference: str, threshold: float = ANLS_THRESHOLD) -> float:
    """1 - normalised edit distance where that distance is below the threshold, else 0; range 0 to 1.

    Average Normalised Levenshtein Similarity for one answer, arXiv:1907.00490, equation 1: the distance is divided by the
    longer of the two. Case, and white space at the ends, do not count, as in the ST-VQA and DocVQA evaluation servers.
    """
    from rapidfuzz.distance import Levenshtein

    first, second = answer.strip().casefold(), reference.strip().casefold()
    distance = Levenshtein.normalized_distance(first, second)
    return 1 - distance if distance < threshold else 0.0


def relaxed_match(answer: str, reference: str, tolerance: float = RELAXED_TOLERANCE) -> bool:
    """Whether two numbers differ by at most `tolerance` of the reference; texts must be equal but for case.

    ChartQA's relaxed accuracy, arXiv:2203.10244, as pix2struct's metrics.py has it: `5%` is 0.05, and only a reference of
    exactly 0 asks for exactly 0. Beyond that script, `1,250` and `$5` are numbers. Years are numbers to it too: 2010 is
    within 5 % of 2015.
    """
    said, meant = read_number(answer), read_number(reference)
    if said is None or meant is None:
        return answer.strip().casefold() == reference.strip().casefold()
    return math.isclose(said, meant, rel_tol=0, abs_tol=tolerance * abs(meant) * (1 + 1e-9))


def read_number(text: str) -> float | None:
    """The number that a text is: `-1,250.5`, `$5`, `2e-4`, `5%` as 0.05; None for anything else."""
    match = _NUMBER.fullmatch(text.strip().replace("−", "-"))
    if match is None:
        return None
    number = float(match["sign"] + match["digits"].replace(",", "") + match["power"])
    number = number / 100 if match["percent"] else number
    return number if math.isfinite(number) else None


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the words both have in common; range 0 to 1, symmetric.

    SQuAD's F1 (Rajpurkar et al., arXiv:1606.05250), over words as `normalise` leaves them. Two texts without words
    are equal, one without is wrong.
    """
    said, meant = normalise(answer).split(), normalise(reference).split()
    if not said or not meant:
        return float(said == meant)
    common = (Counter(said) & Counter(meant)).total()
    return 2 * common / (len(said) + len(meant))


def vqa_soft(answer: str, people: Sequence[str]) -> float:
    """min(matches / 3, 1) over what the other people said, averaged over leaving out each person once; range 0 to 1.

    VQA accuracy as https://visualqa.org/evaluation.html computes it from ten people's answers, compared by `normalise`.
    With two or three people all others must agree with the answer, where the formula could never give 1; one person's
    answer is right or wrong.
    """
    said = normalise(answer)
    matches = [said == normalise(one) for one in people]
    if len(people) < 2:
        return float(any(matches))
    needed = min(VQA_MATCHES, len(people) - 1)
    return sum(min((sum(matches) - match) / needed, 1) for match in matches) / len(people)


def char_error_rate(answer: str, reference: str) -> float:
    """Insertions, deletions and substitutions of characters, divided by the reference's characters; lower is better.

    Range 0 to 1: an answer longer than its reference can need more edits than that has characters, and is cut at 1, so that
    one endless answer does not outweigh a hundred good ones. Case counts, white space at the ends does not; texts are
    compared in Unicode's NFC. Levenshtein 1966; as a rate Morris et al. 2004, Interspeech.
    """
    return _error_rate(_composed(answer), _composed(reference))


def word_error_rate(answer: str, reference: str) -> float:
    """The same over words between white space; range 0 to 1, lower is better."""
    return _error_rate(_composed(answer).split(), _composed(reference).split())


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


def _error_rate(said: Sequence[str], meant: Sequence[str]) -> float:
    from rapidfuzz.distance import Levenshtein

    if not meant:
        return float(bool(said))
    return min(Levenshtein.distance(said, meant) / len(meant), 1.0)


def repeated_share(tokens: Sequence[Hashable], ngram: int) -> float:
    """Share of n-grams that occurred before; 0 to below 1, and 0 where there are fewer than `ngram` tokens.

    1 - distinct n-grams / n-grams: the repetition penalty of Yeo et al., arXiv:2502.03373, appendix C.2, as TRL counts it.
    """
    grams = list(zip(*(tokens[start:] for start in range(ngram)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
