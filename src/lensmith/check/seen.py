"""What the model sees of a sample, drawn back from what it is fed: pictures from their patches, words from ids and labels.

Nothing here knows what the row said. So what is shown is what is learned, also where the way from row to ids went wrong.
"""

from __future__ import annotations

import codecs
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lensmith.data.images import grid_of, read_patches
from lensmith.types import IGNORE

if TYPE_CHECKING:
    from jaxtyping import Float
    from PIL import Image
    from torch import Tensor

    from lensmith.types import Encoded, ImageSize, VisionGeometry


@dataclass(frozen=True, slots=True)
class Piece:
    """The fewest neighbouring tokens that spell whole characters; for a special token, all its repeats in a row."""

    text: str | None
    """None for what is left out of a long run of text."""
    tokens: int
    special: bool
    """Whether it is an added token, such as <|im_end|>; the same characters in a row's text are not."""
    learned: bool


def draw_seen(size: ImageSize, geometry: VisionGeometry) -> Image.Image:
    """The picture exactly as the image tower takes it: upright, RGB, resized to `size.seen_px`.

    Raises:
        RowError: the picture cannot be read.
    """
    return draw_patches(read_patches(size, geometry), grid_of(size, geometry), geometry)


def draw_patches(
    patches: Float[Tensor, "patches values"], grid: tuple[int, int, int], geometry: VisionGeometry
) -> Image.Image:
    """The inverse of `read_patches`: patches back in their places, normalising undone, to the bit.

    Of a moment with several frames the first is drawn: they are equal for a still picture.
    """
    import torch
    from PIL import Image

    _, rows, columns = grid
    merge, patch = geometry.merge, geometry.patch_px
    # tokens, their patches, channel, frame, y, x -> [token row, row in token, y, token column, column in token, x, channel]
    values = patches.reshape(-1, rows // merge, columns // merge, merge, merge, 3, geometry.frames, patch, patch)
    bytes_ = values[0, ..., 0, :, :].permute(0, 2, 5, 1, 3, 6, 4).reshape(rows * patch, columns * patch, 3)
    mean, std = torch.tensor(geometry.mean), torch.tensor(geometry.std)
    return Image.fromarray((bytes_ * (255 * std) + 255 * mean).round().to(torch.uint8).numpy())


def read_back(encoded: Encoded, tokenizer: Any, *, most_tokens: int | None = None) -> Iterator[Piece]:
    """Ids decoded token by token, each with whether its label is learned.

    `tokenizer`: the checkpoint's fast one. `most_tokens`: of longer runs of text the rest is left out, as one piece.
    """
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
    ids, learned = encoded.input_ids, encoded.labels != IGNORE
    is_added = np.isin(ids, list(added))
    # A run ends where text meets special tokens or learned meets not learned; a special token, also where another follows.
    differs = (is_added[1:] != is_added[:-1]) | (learned[1:] != learned[:-1]) | (is_added[1:] & (ids[1:] != ids[:-1]))
    for run in np.split(np.arange(len(ids)), np.flatnonzero(differs) + 1):
        first, is_learned = run[0], bool(learned[run[0]])
        if is_added[first]:
            yield Piece(added[int(ids[first])], len(run), True, is_learned)
            continue
        spelled = ids[run[:most_tokens]].tolist()
        for text, tokens in _spell(spelled, tokenizer):
            yield Piece(text, tokens, False, is_learned)
        if len(spelled) < len(run):
            yield Piece(None, len(run) - len(spelled), False, is_learned)


def _spell(ids: list[int], tokenizer: Any) -> Iterator[tuple[str, int]]:
    """Text and number of tokens of each piece. Qwen's tokens are bytes, written as letters the way GPT-2 writes them."""
    decoder, byte_of = codecs.getincrementaldecoder("utf-8")("replace"), _byte_letters()
    text, tokens = "", 0
    for token in tokenizer.convert_ids_to_tokens(ids):
        text += decoder.decode(bytes(byte_of[letter] for letter in token))
        tokens += 1
        if not decoder.getstate()[0]:  # no byte waits for the rest of its character
            yield text, tokens
            text, tokens = "", 0
    if tokens:
        yield text + decoder.decode(b"", final=True), tokens


@functools.cache
def _byte_letters() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}
