"""What texts alone tell: media tokens written out, answers that end in a loop, texts that say the same, scripts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Int

MEDIA_TOKENS = re.compile(r"<\|(?:image_pad|video_pad|vision_start|vision_end|vision_pad)\|>|<image>|<video>")
"""Qwen3-VL's media tokens, and the marks that data files use for them; anything that marks a place is gone by now."""

LOOP_REPEATS = 8
"""So often the same piece must stand at the end of an answer: prose repeats itself three or four times at most."""
LOOP_CHARACTERS = 200
"""And it must fill so much: a row of eight equal digits in a table is no loop."""
LOOP_PIECE = 200
"""Longest piece looked for, about a sentence or two."""
LOOP_TAIL = 12
"""Last characters that are looked for further up: short enough for any loop, rare enough elsewhere."""

SCRIPTS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "Latin": ((0x41, 0x5B), (0x61, 0x7B), (0xC0, 0x250), (0x1E00, 0x1F00)),
    "Greek": ((0x370, 0x400), (0x1F00, 0x2000)),
    "Cyrillic": ((0x400, 0x530),),
    "Hebrew": ((0x590, 0x600),),
    "Arabic": ((0x600, 0x700), (0x750, 0x780), (0xFB50, 0xFE00), (0xFE70, 0xFF00)),
    "Devanagari": ((0x900, 0x980),),
    "Bengali": ((0x980, 0xA00),),
    "Tamil": ((0xB80, 0xC00),),
    "Thai": ((0xE00, 0xE80),),
    "Hangul": ((0x1100, 0x1200), (0xAC00, 0xD7B0)),
    "Kana": ((0x3040, 0x3100),),
    "Han": ((0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00), (0x20000, 0x32000)),
}
"""Blocks of the Unicode standard, start inclusive, end exclusive. Scripts, not languages: telling languages apart needs
a model, and is wrong too often on five words."""

_BOUNDS = np.array(sorted(bound for blocks in SCRIPTS.values() for block in blocks for bound in block), dtype=np.uint32)
_SCRIPT_BY_START = {start: number for number, blocks in enumerate(SCRIPTS.values()) for start, _ in blocks}


def media_tokens(text: str) -> list[str]:
    """The media tokens that stand in a text as plain characters."""
    return MEDIA_TOKENS.findall(text) if "<" in text else []


def ends_in_loop(text: str) -> str | None:
    """The piece that an answer repeats at its end without end, or None.

    The last characters equal those one piece earlier for LOOP_REPEATS - 1 pieces, and at least LOOP_CHARACTERS in all.
    Pieces without a letter or digit (rules, dots, blanks) are typography. What a cut left over after the last whole
    piece does not matter, since any rotation of the piece repeats as well.
    """
    text = text.rstrip()
    if len(text) < LOOP_CHARACTERS:
        return None
    tail = text[-LOOP_TAIL:]
    # A text of period p holds its last characters again p earlier, so only those distances need a look.
    start = len(text) - len(tail)
    while (start := text.rfind(tail, max(0, len(text) - len(tail) - LOOP_PIECE), start + len(tail) - 1)) >= 0:
        length = len(text) - len(tail) - start
        span = max((LOOP_REPEATS - 1) * length, LOOP_CHARACTERS - length)
        if len(text) >= span + length and text[-span:] == text[-span - length : -length]:
            piece = text[-length:]
            return piece if any(map(str.isalnum, piece)) else None
    return None


def plain(text: str) -> str:
    """A text without case, extra white space and final punctuation: what a person would call the same answer."""
    return " ".join(text.casefold().split()).rstrip(".!?。 ")


def count_scripts(text: str) -> Int[np.ndarray, " scripts"]:
    """Letters of each of SCRIPTS."""
    letters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    blocks = np.bincount(np.searchsorted(_BOUNDS, letters, side="right"), minlength=len(_BOUNDS) + 1)
    counts = np.zeros(len(SCRIPTS), dtype=np.int64)
    for number, bound in enumerate(_BOUNDS.tolist(), 1):
        script = _SCRIPT_BY_START.get(bound)
        if script is not None:
            counts[script] += blocks[number]
    return counts
