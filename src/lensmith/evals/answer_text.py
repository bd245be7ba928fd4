"""Where in a completion its answer stands: behind the thought, between <answer> tags, in the last \\boxed{}.

Every reward and metric reads completions through these three, so that a thought never scores.
"""

from __future__ import annotations

import re
from typing import Literal

from lensmith.data.thoughts import CLOSE, OPEN

Read = Literal["final", "boxed", "text"]
"""`final`: behind the thought, between <answer> tags where there are some. `boxed`: the last \\boxed{} behind the thought.
`text`: all of the completion."""

Shape = Literal["think_answer", "answer", "boxed"]

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
# Possessive white space and one alternative per character: no text makes the search go back and forth.
_BRACE = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*+\{)|(?P<open>\{)|(?P<close>\})|\\.", re.DOTALL)
_THINK_ANSWER = re.compile(r"\s*<think>(?P<thought>.*?)</think>\s*<answer>(?P<said>.*?)</answer>\s*", re.DOTALL)
_ONLY_ANSWER = re.compile(r"\s*<answer>(?P<said>.*?)</answer>\s*", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer)>")
_BOX_OPENING = re.compile(r"\\(?:boxed|fbox)\s*\{")


def read_answer(text: str, read: Read = "final") -> str | None:
    """The part of a completion that is judged, without white space at its ends; None where there is no box to read."""
    if read == "text":
        return text.strip()
    return extract_boxed(after_thought(text)) if read == "boxed" else final_answer(text)


def after_thought(text: str) -> str:
    """What follows the last thought. Nothing inside one counts, nor what follows a <think> that never closes."""
    return text.rpartition(CLOSE)[2].partition(OPEN)[0]


def final_answer(text: str) -> str:
    """What follows the thought; of that, what stands in the last <answer> tags where there are some. Ends stripped."""
    said = after_thought(text)
    tagged = ANSWER.findall(said)
    return (tagged[-1] if tagged else said).strip()


def has_shape(text: str, shape: Shape) -> bool:
    """Whether a whole completion has the shape: thought and answer in their tags, the answer alone in its, or one \\boxed{}.

    Tags as in DeepSeek-R1, arXiv:2501.12948, 2.2.2.
    """
    if shape == "boxed":
        said = after_thought(text)
        return len(_BOX_OPENING.findall(said)) == 1 and bool(extract_boxed(said))
    match = (_THINK_ANSWER if shape == "think_answer" else _ONLY_ANSWER).fullmatch(text)
    return match is not None and bool(match["said"].strip()) and not any(map(_TAG.search, match.groups()))


def extract_boxed(text: str) -> str | None:
    """What the last \\boxed{} (or \\fbox{}) holds, stripped; None where there is none, or the last one never closes.

    Braces may nest, `\\{` and `\\}` do not count, and a box around nothing but a box is the inner one's content. The last
    box decides, also where it was cut off: an earlier one may be a step on the way.
    """
    opened: list[tuple[bool, int]] = []  # whether a box, and where what it holds begins
    last: tuple[int, int] | None = None
    for match in _BRACE.finditer(text):
        if match["box"] or match["open"]:
            opened.append((match["box"] is not None, match.end()))
        elif match["close"] and opened:
            is_box, start = opened.pop()
            # What closes last lies behind the others or around them.
            last = (start, match.start()) if is_box else last
    if last is None or any(is_box and start > last[0] for is_box, start in opened):
        return None
    return _unwrapped(text[slice(*last)].strip())


def _unwrapped(content: str) -> str:
    opening = _BRACE.match(content)
    if opening is None or not opening["box"]:
        return content
    inner = extract_boxed(content)
    is_whole = inner is not None and content[opening.end() :].rstrip("}").strip() == inner.rstrip("}").strip()
    return inner if inner is not None and is_whole else content
