"""One question about one picture, to the tuned model and on request to its base, told while it is answered."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lensmith.errors import DataError, ModelError
from lensmith.serve.generate import Answer, Sampling
from lensmith.serve.subject import Subject, Which, open_subject
from lensmith.types import ImageMark, ImageRef, Message, Sample, Text


def ask_subject(
    subject: str,
    image: Path,
    question: str,
    *,
    with_base: bool = False,
    max_new_tokens: int,
    say: Callable[[str], None],
    on_text: Callable[[str], None] | None = None,
) -> dict[Which, Answer]:
    """The answers of a run, one of its checkpoints, or a model: by default what is tuned, with `with_base` both.

    Args:
        say: for sentences; without `on_text` also for the answers.
        on_text: given each piece of an answer as it is made.

    Raises:
        DataError: there is no such picture, or it cannot be read.
        ModelError: both are asked, and there is only one.
    """
    if not image.is_file():
        raise DataError(f"{image}: no such picture, so there is nothing to ask about. Give the path of an image file.")
    opened = open_subject(subject, say=say)
    if with_base and set(opened.kinds) != {"base", "tuned"}:
        raise ModelError(
            f"{subject}: only its {opened.kinds[0]} model can answer here, so there are not two to compare. "
            "Leave out --base, or give a run that trained an adapter."
        )
    sample = Sample(
        "the question", (Message("user", (ImageMark(0), Text(question))),), (ImageRef(image, key=str(image)),)
    )
    answers: dict[Which, Answer] = {}
    asked: tuple[Which, ...] = ("base", "tuned") if with_base else (opened.find(None),)
    for which in asked:
        if with_base:
            say(f"{which}:")
        answers[which] = _ask(opened, which, sample, max_new_tokens, say, on_text)
    return answers


def _ask(
    opened: Subject,
    which: Which,
    sample: Sample,
    max_new_tokens: int,
    say: Callable[[str], None],
    on_text: Callable[[str], None] | None,
) -> Answer:
    answer = opened.answer(which, sample, Sampling(max_new_tokens), on_text=on_text)
    if on_text is None:
        say(printable(answer.text.strip()))
    else:
        on_text("\n")
    if not answer.stopped:
        say(f"(cut off after {answer.tokens:,} tokens; for more, --max-tokens {2 * max_new_tokens})")
    return answer


def terminal_writer() -> Callable[[str], None] | None:
    """What writes pieces to the terminal of the person, who reads stderr; None where that is no terminal."""
    if not sys.stderr.isatty():
        return None

    def write(piece: str) -> None:
        sys.stderr.write(printable(piece))
        sys.stderr.flush()

    return write


def printable(text: str) -> str:
    """The text without what would steer a terminal; a model may write anything."""
    return "".join(
        ascii(letter)[1:-1] if unicodedata.category(letter) == "Cc" and letter not in "\n\t" else letter
        for letter in text
    )


def answer_json(answers: dict[Which, Answer]) -> dict[str, Any]:
    """For `--json`: the answer that was asked for, and the base's beside it where both were."""
    parts = {which: asdict(answer) | {"answer": answer.text.strip()} for which, answer in answers.items()}
    for part in parts.values():
        del part["text"]
    main = parts.get("tuned") or parts["base"]
    return main if len(parts) == 1 else main | {"base": parts["base"]}
