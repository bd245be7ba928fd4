"""Texts as the VQA evaluation compares them, pure: case, punctuation, articles and number words taken away."""

from __future__ import annotations

import re
import unicodedata

# The lists of the VQA evaluation, https://visualqa.org/evaluation.html (Antol et al., arXiv:1505.00468).
ARTICLES = frozenset({"a", "an", "the"})
_ZERO_TO_TEN = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBER_WORDS: dict[str, str] = {word: str(number) for number, word in enumerate(_ZERO_TO_TEN)} | {"none": "0"}

_APOSTROPHES = str.maketrans("", "", "'’`")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_NUMBER = re.compile(r"(?<!\w)-?\.?\d+(?:[.,:/-]\d+)*")


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
