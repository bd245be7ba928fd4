"""What the model sees of a sample, drawn back from what it is fed: pictures from their patches, words from ids and labels.

Nothing here knows what the row said. So what is shown is what is learned, also where the way from row to ids went wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lensmith.data.images import grid_of, read_patches
from lensmith.types import IGNORE

if TYPE_CHECKING:
    from jaxtyping import Float
    from PIL import Image
    from torch import Tensor

    from lensmith.types import Encoded, ImageSize, VisionGeometry

UNFINISHED = "\ufffd"
"""What tokenizers decode to where the bytes of a character are still missing."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The fewest neighbouring tokens that spell whole characters; for a special token, all its repeats in a row."""

    text: str
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


def read_back(encoded: Encoded, tokenizer: Any) -> tuple[Piece, ...]:
    """Ids decoded token by token, each with whether its label is learned.

    `tokenizer`: the checkpoint's fast tokenizer.
    """
    return tuple(_pieces(encoded, tokenizer))


def _pieces(encoded: Encoded, tokenizer: Any) -> Iterator[Piece]:
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
    ids, learned = encoded.input_ids.tolist(), (encoded.labels != IGNORE).tolist()
    start = 0
    for stop in range(1, len(ids) + 1):
        is_last = stop == len(ids) or (ids[stop] in added) != (ids[start] in added) or learned[stop] != learned[start]
        if ids[start] in added:
            if is_last or ids[stop] != ids[start]:
                yield Piece(added[ids[start]], stop - start, True, learned[start])
                start = stop
            continue
        text = tokenizer.decode(ids[start:stop], clean_up_tokenization_spaces=False)
        if is_last or not text.endswith(UNFINISHED):
            yield Piece(text, stop - start, False, learned[start])
            start = stop
