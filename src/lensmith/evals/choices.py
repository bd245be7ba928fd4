"""Multiple choice: which letter a question offers for what, and which one an answer means; pure.

An answer is read in the order of how plainly it speaks, much as the evaluation of MMMU does (Yue et al., arXiv:2311.16502),
except that nothing is drawn at random where no letter is found: such an answer is wrong.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence

from lensmith.evals.answer_text import extract_boxed
from lensmith.evals.normalise import normalise

Options = Mapping[str, str]
"""Letter -> text."""

# Possessive, so that no text makes the search go back and forth.
OPTION_LINE = re.compile(r"^[ \t]*+[(\[]?([A-Z])[)\].:][ \t]*+(\S.*)$", re.MULTILINE)
INLINE_OPTION = re.compile(r"\(([A-Z])\)\s*([^()]+?)\s*(?=[,;]?\s*\([A-Z]\)|[.?]?\s*$)")
LETTERS = "ABCDEFGH"
"""Of a question whose options are not known; beyond them `I` would be a choice wherever somebody speaks of themselves."""

_ALONE = re.compile(r"[\s*_`\"'(\[]*([A-Za-z])[\s*_`\"')\].:]*")
_LEADING = re.compile(r"[\s*_]*(?:[(\[]([A-Z])[)\]]|([A-Z])[).:])(?:[\s*_]|$)")
_SPOKEN = r"(?i:\b(?:answer|option|choice|choose|select|pick)\b(?:\s+(?:is|would\s+be|option|choice|letter))*)"
# The letter is a capital: a small one behind "the answer is" is an article or begins a word.
_NAMED = re.compile(rf"{_SPOKEN}\s*+:?[\s*_(\[\"'`]*+([A-Z])(?![\w'’])")
_SAID = re.compile(rf"{_SPOKEN}\s*+:?\s*+(.+)$", re.MULTILINE)
_BRACKETED = re.compile(r"\(([A-Z])\)|\*\*([A-Z])\*\*")


def read_options(question: str, listed: Sequence[str] | None = None) -> dict[str, str]:
    """The options of a question by letter: `listed` (a column of them) if given, else lines `A. Paris`, or `(A) Paris (B) ...`.

    Empty where there are fewer than two, or the letters do not go on from A.
    """
    if listed:
        texts = [match[2] if (match := OPTION_LINE.fullmatch(text)) else text.strip() for text in map(str, listed)]
        return dict(zip(string.ascii_uppercase, texts, strict=False))
    for pattern in (OPTION_LINE, INLINE_OPTION):
        found = pattern.findall(question)
        letters = "".join(letter for letter, _ in found)
        if len(found) > 1 and string.ascii_uppercase.startswith(letters):
            return {letter: text.strip() for letter, text in found}
    return {}


def read_choice(text: str, options: Options) -> str | None:
    """The letter that a text means; None where it means none, or several.

    Args:
        options: of the question; empty where they are not known, and then any of LETTERS counts.
    """
    text = extract_boxed(text) or text
    alone = _ALONE.fullmatch(text)
    leading = _LEADING.match(text)
    letters = set(options or LETTERS)
    # From the plainest way of saying it to the vaguest; the first that says anything decides.
    for found in (
        [alone[1].upper()] if alone else [],
        _letters_of(text, options),
        [leading[1] or leading[2]] if leading else [],
        _NAMED.findall(text)[-1:],
        [letter for said in _SAID.findall(text) for letter in _letters_of(said, options)][-1:],
        [one or other for one, other in _BRACKETED.findall(text)],
        _mentioned(text, options),
    ):
        meant = set(found) & letters
        if meant:
            return meant.pop() if len(meant) == 1 else None
    return None


def choice_match(answer: str, reference: str, options: Options) -> bool:
    """Whether both mean the same option; a reference that means none is compared as `normalised` does."""
    meant = read_choice(reference, options)
    if meant is None:
        return normalise(answer) == normalise(reference)
    return read_choice(answer, options) == meant


def _letters_of(text: str, options: Options) -> list[str]:
    plain = normalise(text)
    return [letter for letter, option in options.items() if plain and normalise(option) == plain]


def _mentioned(text: str, options: Options) -> list[str]:
    """Options whose words the text holds; one whose words are part of another such option's is not meant itself."""
    plain = f" {normalise(text)} "
    found = {letter: f" {normalise(option)} " for letter, option in options.items()}
    held = {letter: option for letter, option in found.items() if option.strip() and option in plain}
    return [letter for letter, said in held.items() if not any(said != o and said in o for o in held.values())]
