"""Plain text to token ids, a word at a time, so that a word is cut into tokens once and not in every row.

Byte-level tokenizers split a text by a pattern and cut each piece on its own, so a text's ids are its pieces' ids. The
pattern speaks of letters and digits of all scripts, on which no two libraries quite agree; within ASCII there is nothing to
disagree about. So ASCII texts are split here, by Qwen's pattern restricted to ASCII, and their words looked up; any other
text, and any tokenizer with another pattern, goes to the tokenizer whole (tests/reference/test_words.py).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""As in the tokenizer.json of Qwen2 and of everything since."""
ASCII_SPLIT = re.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\na-zA-Z0-9]?[a-zA-Z]+|[0-9]| ?[^\sa-zA-Z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    re.ASCII,
)
"""The same for texts within ASCII."""

KNOWN_WORDS, LONGEST_WORD = 65_536, 64
"""So many words of at most so many characters are remembered, about 250 bytes each, and then all forgotten. A text that is
not split counts as a word, so that templated questions of any script are remembered too."""

FEW_WORDS = 4
"""Up to so many new words of a text are cut one by one, at 5 µs each; more take longer than the whole text."""


class WordTokenizer:
    """A checkpoint's tokenizer for plain text, in which special tokens are nothing but characters; picklable."""

    def __init__(self, backend: Tokenizer) -> None:
        # A copy, because the caller's must go on turning "<|im_end|>" into its id.
        self._whole = type(backend).from_str(backend.to_str())
        self._whole.no_truncation()
        self._whole.no_padding()
        self._whole.encode_special_tokens = True
        self._splits = _splits_like_qwen(json.loads(backend.to_str()))
        # Added tokens that are not special, such as <think>, keep their meaning in a text and are not split.
        added = [token.content for token in backend.get_added_tokens_decoder().values() if not token.special]
        self._added = re.compile("|".join(map(re.escape, added)) or "(?!)")
        self._known: dict[str, list[int]] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # tokenizers does not save this switch; without it, special tokens in texts would work again in data workers.
        self._whole.encode_special_tokens = True

    def __call__(self, text: str) -> list[int]:
        """Ids of a text."""
        is_plain = self._splits and text.isascii() and not self._added.search(text)
        words = ASCII_SPLIT.findall(text) if is_plain else [text]
        known = self._known
        if len(known) + len(words) > KNOWN_WORDS:
            known.clear()  # a new topic has new words
        new = [word for word in words if word not in known]
        if len(new) > FEW_WORDS or any(len(word) > LONGEST_WORD for word in new):
            return self._learn(text, words)
        for word in new:
            self._learn(word, [word])
        ids: list[int] = []
        for word in words:
            ids += known[word]
        return ids

    def _learn(self, text: str, words: list[str]) -> list[int]:
        """Ids of a text, and those of its words for the next one."""
        whole = self._whole.encode(text, add_special_tokens=False)
        ids = whole.ids
        lengths = Counter(whole.word_ids) if len(words) > 1 else {0: len(ids)}
        start = 0
        for number, word in enumerate(words):
            stop = start + lengths[number]
            if len(word) <= LONGEST_WORD:
                self._known[word] = ids[start:stop]
            start = stop
        return ids


def _splits_like_qwen(tokenizer: dict[str, Any]) -> bool:
    """Whether the tokenizer of this tokenizer.json cuts each piece of QWEN_SPLIT on its own, the same way every time."""
    steps = (tokenizer["pre_tokenizer"] or {}).get("pretokenizers", [])
    if [step["type"] for step in steps] != ["Split", "ByteLevel"]:
        return False
    split, level = steps
    return (
        split["pattern"] == {"Regex": QWEN_SPLIT}
        and (split["behavior"], split["invert"]) == ("Isolated", False)
        and not (level["add_prefix_space"] or level["use_regex"])
        and tokenizer["normalizer"] in (None, {"type": "NFC"})  # which changes nothing within ASCII
        and tokenizer["model"]["type"] == "BPE"
        and not tokenizer["model"].get("dropout")
    )
