"""The data collator of notebooks: nothing is collated here, but what it is told about rows is understood."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from lensmith.errors import ConfigError
from lensmith.recipe.keywords import read_keywords
from lensmith.recipe.names_model import COLLATOR, COLLATOR_RENAMED, PIXELS_PER_TOKEN
from lensmith.recipe.session import Settings, Wanted, session_of
from lensmith.recipe.speech import say_once

CALL = "VisionDataCollator"


class VisionDataCollator:
    """Takes Unsloth's arguments; the trainer reads `settings` and `formatting_func`, and packs rows itself."""

    def __init__(self, model: Any, processor: Any = None, **keywords: Any) -> None:
        if "tokenizer" in keywords and processor is None:
            processor = keywords.pop("tokenizer")
        given = read_keywords(CALL, keywords, COLLATOR, COLLATOR_RENAMED)
        session_of(model, CALL)
        self.processor = processor
        self.formatting_func: Callable[[Any], Any] | None = given.get("formatting_func")
        self.settings: Settings = {}
        if given.get("max_seq_length") is not None:
            self.settings["pack.tokens"] = Wanted(given["max_seq_length"], f"{CALL}(max_seq_length=)")
        if (tokens := _resize_tokens(given.get("resize", "min"))) is not None:
            self.settings["data.image.max_tokens"] = Wanted(tokens, f"{CALL}(resize=)")

    def __call__(self, rows: Any) -> NoReturn:
        raise ConfigError(
            f"{CALL}: rows are packed by the trainer, so there is no batch to look at. `lensmith check RUN/rows/train.jsonl` "
            "shows every row as the model sees it."
        )


UnslothVisionDataCollator = VisionDataCollator
"""The same by the name that notebooks know."""


def _resize_tokens(resize: Any) -> int | None:
    """Most tokens of an image, where a size was asked for; None keeps the limits."""
    if resize in ("min", "max"):
        return None
    sides = (resize, resize) if isinstance(resize, int) and not isinstance(resize, bool) else resize
    if (
        not isinstance(sides, tuple | list)
        or len(sides) != 2
        or not all(isinstance(side, int) and side >= 32 for side in sides)
    ):
        raise ConfigError(
            f'{CALL}: resize is {resize!r}, but must be "min", "max", a side in pixels or (width, height), from 32 on. '
            "Images keep their shape and size here; max_pixels limits them."
        )
    tokens = sides[0] * sides[1] // PIXELS_PER_TOKEN
    say_once(f"{CALL}(resize={resize!r}): images keep their shape, and cost {tokens} tokens at most.")
    return tokens
