"""The <think> parts of answers: counted, and with data.reasoning=drop taken out before anything is encoded."""

from __future__ import annotations

import re

from lensmith.errors import RowError

OPEN, CLOSE = "<think>", "</think>"
THOUGHT = re.compile(rf"{OPEN}.*?{CLOSE}\s*", re.DOTALL)
UNOPENED = re.compile(rf"\A(?:(?!{OPEN}).)*?{CLOSE}\s*", re.DOTALL)
"""Thinking checkpoints open the thought in their prompt, so what they wrote begins inside it."""


def count_thoughts(text: str) -> int:
    """How many thoughts an answer ends."""
    return text.count(CLOSE)


def drop_thoughts(text: str, where: str) -> str:
    """The answer without its thoughts, and without the white space behind each.

    Raises:
        RowError: `malformed_row` for a thought that does not end, `empty_answer` where there is nothing else.
    """
    if OPEN not in text and CLOSE not in text:
        return text
    said = THOUGHT.sub("", UNOPENED.sub("", text, count=1))
    for mark, fault in ((OPEN, "never closed"), (CLOSE, "never opened")):
        if mark in said:
            raise RowError(
                where,
                "malformed_row",
                f"an answer holds a {mark} that is {fault}, so data.reasoning=drop cannot tell the thought from the "
                "answer; mend it, or set data.reasoning=keep.",
            )
    if text.strip() and not said.strip():
        raise RowError(
            where,
            "empty_answer",
            f"an answer is all thought ({len(text):,} characters) and nothing is left with data.reasoning=drop; "
            "add the answer, or set data.reasoning=keep.",
        )
    return said
