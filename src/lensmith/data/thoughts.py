"""The <think> parts of answers: counted, and with data.reasoning=drop taken out before anything is encoded."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lensmith.errors import RowError

OPEN, CLOSE = "<think>", "</think>"
THOUGHT = re.compile(rf"{OPEN}.*?{CLOSE}\s*", re.DOTALL)
UNOPENED = re.compile(rf"\A(?:(?!{OPEN}).)*?{CLOSE}\s*", re.DOTALL)
"""Thinking checkpoints open the thought in their prompt, so what they wrote begins inside it."""


def count_thoughts(text: str) -> int:
    """How many thoughts an answer ends."""
    return text.count(CLOSE)


def holds_thought(text: str) -> bool:
    """Whether there is anything of a thought in an answer, whole or not."""
    return OPEN in text or CLOSE in text


def drop_thoughts(texts: Sequence[str], where: str) -> list[str]:
    """The texts of one answer without their thoughts, and without the white space behind each.

    Raises:
        RowError: `malformed_row` for a thought that does not end, `empty_answer` where there is nothing else.
    """
    said = [THOUGHT.sub("", UNOPENED.sub("", text, count=1)) if CLOSE in text else text for text in texts]
    for mark, fault in ((OPEN, "never closed"), (CLOSE, "never opened")):
        if any(mark in text for text in said):
            raise RowError(
                where,
                "malformed_row",
                f"an answer holds a {mark} that is {fault}, so data.reasoning=drop cannot tell the thought from the "
                "answer; mend it, or set data.reasoning=keep.",
            )
    if not "".join(said).strip():
        raise RowError(
            where,
            "empty_answer",
            f"an answer is all thought ({sum(map(len, texts)):,} characters) and nothing is left with "
            "data.reasoning=drop; add the answer, or set data.reasoning=keep.",
        )
    return said
