"""What can go wrong by the user's hand. Every message has four parts: where, what, the two values, the way out.

The command line prints these without a traceback and exits with 1; any other exception is a bug in Lensmith, shows its
traceback and exits with 2.
"""

from __future__ import annotations

from typing import Literal


class LensmithError(Exception):
    """Something the user can mend; the message says how."""


class ConfigError(LensmithError):
    """A setting is unknown, of the wrong type, contradictory or without effect."""


class DataError(LensmithError):
    """A row, image or data file cannot be used as it is."""


RowCode = Literal[
    "not_json",
    "malformed_row",
    "unknown_role",
    "marks_mismatch",
    "empty_question",
    "empty_answer",
    "no_answer",
    "missing_file",
    "outside_root",
    "url_not_allowed",
    "private_address",
    "unreadable_image",
    "truncated_image",
    "unreadable_video",
    "unreadable_document",
    "decompression_bomb",
    "extreme_aspect",
    "template_refused",
    "too_long",
]
"""Why one row cannot be used: the stable names that reports and `lensmith check` count by."""


LONGEST_SENTENCE = 800
"""Characters; what a row holds is quoted, and may be longer than any line."""


def readable(sentence: str) -> str:
    """One line that any terminal takes: what cannot be printed as its escape, the middle of too long a quotation left out."""
    if len(sentence) > LONGEST_SENTENCE:
        half = LONGEST_SENTENCE // 2
        sentence = f"{sentence[:half]} ... {sentence[-half:]}"
    if sentence.isprintable():
        return sentence
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in sentence)


class RowError(DataError):
    """One row that cannot be used; the rest of the file may be fine, so data.on_bad_row=skip leaves it out."""

    def __init__(self, where: str, code: RowCode, sentence: str) -> None:
        sentence = readable(sentence)
        super().__init__(where, code, sentence)
        self.where = where
        self.code: RowCode = code
        self.sentence = sentence

    def at(self, where: str) -> RowError:
        """The same fault told from further out: what it says of a picture, said of the row that names the picture."""
        return RowError(where, self.code, str(self))

    def __str__(self) -> str:
        return f"{self.where}: {self.sentence}"


class ModelError(LensmithError):
    """A model name, folder, adapter or version that cannot be used here."""


class RunError(LensmithError):
    """A run stopped: non-finite steps, a failed self-check, no space left, a folder of another run."""


class RewardError(LensmithError):
    """A reward cannot judge a completion: it raised, answered with something else than numbers, or lacks a column."""


class MetricError(LensmithError):
    """A metric cannot judge an answer: it raised, answered with something else than a number from 0 to 1, or lacks a column."""


class EndpointError(LensmithError):
    """A server that is asked for answers cannot be reached, refuses, or answers as none should."""


class Interrupted(RunError):
    """Ctrl-C: what was done so far is saved, and the message says how to go on."""
