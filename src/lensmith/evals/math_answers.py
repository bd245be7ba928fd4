"""Whether two short answers are the same number, formula or word.

    the same text ──> prose: the same words ──> the same number ──> the same formula, by math-verify
                      (`normalise`)             (exact fractions)   (seconds at most)

math-verify parses LaTeX into sympy and compares there, in a process of its own (`math_process`), so that a tower of powers is
wrong within seconds, in whatever thread it is asked.
"""

from __future__ import annotations

import functools
import re
import warnings
from fractions import Fraction
from importlib.util import find_spec

from lensmith.evals.answer_text import extract_boxed
from lensmith.evals.math_process import math_process
from lensmith.evals.normalise import normalise

MOST_CHARACTERS = 300
"""Longer texts are prose or a derivation, not an answer, and are compared as text."""
REMEMBERED = 4096
"""Pairs whose outcome is kept: the answers of a group are often the same."""

_PROSE = re.compile(r"[\w\s.,;:!?'’\"-]*")
_WORD = re.compile(
    r"(?!(?:sin|cos|tan|cot|sec|csc|log|exp|lim|max|min|mod|sqrt|arcsin|arccos|arctan)\b)\b[^\W\d_]{3,}\b"
)
_WRAPPING = re.compile(
    r"\\(?:text|mathrm|mathbf|textbf|mbox)\{([^{}]*)\}|\\(?:left|right|displaystyle|,|;|!|:)|\$|\\[()\[\]]"
)
_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")
"""White space that says nothing; between two digits it does: 1 1/2 is not 11/2."""
_FRACTION = re.compile(r"([-+]?)\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_NUMBER = re.compile(r"[-+]?(?:\d{1,30}(?:\.\d{0,30})?|\.\d{1,30})(?:/\d{1,30})?")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


@functools.lru_cache(maxsize=REMEMBERED)
def math_equal(answer: str, reference: str) -> bool:
    """Whether the answer says what the reference says: `1/2`, `\\frac12` and `0.5` do, `stop` and `post` do not.

    Not symmetric where math-verify is not: a reference `x=3` takes the answer `3`.
    """
    answer, reference = _plain(answer), _plain(reference)
    if answer == reference:
        return True
    # To sympy a word is the product of its letters, so every anagram of it would be right.
    if _is_prose(answer) or _is_prose(reference):
        return normalise(answer) == normalise(reference)
    said, meant = _exact_number(answer), _exact_number(reference)
    if said is not None and meant is not None:
        return said == meant
    if not answer or not reference or max(len(answer), len(reference)) > MOST_CHARACTERS or not _has_math_verify():
        return False
    return math_process.equal(answer, reference)


@functools.cache
def _has_math_verify() -> bool:
    """Whether formulas can be compared; where not, that is said once."""
    if find_spec("math_verify") is not None and find_spec("latex2sympy2_extended") is not None:
        return True
    warnings.warn(
        "math-verify is not installed, so answers are compared as numbers and as text: \\sqrt{12} and 2\\sqrt{3} count as "
        "different. Install it with: pip install 'math-verify[antlr4_13_2]'.",
        stacklevel=2,
    )
    return False


def _is_prose(text: str) -> bool:
    """Whether a text is words, not a formula: no signs but punctuation, and a word that is not the name of a function."""
    return _PROSE.fullmatch(text) is not None and _WORD.search(text) is not None


def _plain(text: str) -> str:
    """The text without its box, dollar signs, \\text{}, spacing commands and white space; prose keeps its spaces."""
    boxed = extract_boxed(text)
    bare = _WRAPPING.sub(lambda match: match[1] or "", text if boxed is None else boxed).strip()
    return bare if _is_prose(bare) else _SPACE.sub("", bare)


def _exact_number(text: str) -> Fraction | None:
    """`-1,250.5`, `3/4` or `\\frac{3}{4}` as an exact fraction; None for anything else."""
    text = _THOUSANDS.sub("", text.replace("−", "-").rstrip("."))
    fraction = _FRACTION.fullmatch(text)
    text = f"{fraction[1]}{fraction[2]}/{fraction[3]}" if fraction else text
    if not _NUMBER.fullmatch(text):
        return None
    over, _, under = text.partition("/")
    return Fraction(over) / int(under) if under and int(under) else (Fraction(over) if not under else None)
