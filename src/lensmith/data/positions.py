"""M-RoPE positions of one sample, in numpy: what transformers' Qwen3VLModel.get_rope_index says, without a model.

Text counts 1, 2, 3 on all three axes. An image stands still in time and counts its rows and columns, in merged tokens;
the text after it goes on from the larger of the two. So does each moment of a video: its time is written as text. With an
image of 2 x 3 tokens between words:

    tokens   a b [ i i i i i i ] c
    time     0 1 2 3 3 3 3 3 3 6 7
    height   0 1 2 3 3 3 4 4 4 6 7
    width    0 1 2 3 4 5 3 4 5 6 7
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Int


def mrope_positions(
    input_ids: Int[np.ndarray, " tokens"],
    grids: Sequence[tuple[int, int, int]],
    *,
    image_token_id: int,
    video_token_id: int | None = None,
    merge: int,
) -> Int[np.ndarray, "4 tokens"]:
    """Row 0: the token's number; rows 1 to 3: its place in time, height and width.

    `grids`: patches in time, height and width of each image or moment, in order; `merge`: patches per side of one token.

    Raises:
        ValueError: the ids hold more or fewer image tokens than the grids.
    """
    num_tokens = len(input_ids)
    positions = np.broadcast_to(np.arange(num_tokens, dtype=np.int64), (4, num_tokens)).copy()
    if not grids:
        return positions
    shapes = [(frames, height // merge, width // merge) for frames, height, width in grids]
    lengths = [frames * height * width for frames, height, width in shapes]
    ids = np.asarray(input_ids)
    is_image = ids == image_token_id
    (slots,) = np.nonzero(is_image if video_token_id is None else is_image | (ids == video_token_id))
    if len(slots) != sum(lengths):
        raise ValueError(f"{len(slots)} image tokens in the ids but {sum(lengths)} in the grids {list(grids)}")
    behind, first = 0, 0
    for shape, length in zip(shapes, lengths, strict=True):
        start = int(slots[first])
        first += length
        place = np.indices(shape).reshape(3, length)
        positions[1:, start : start + length] = place + (start - behind)
        # An image of n tokens moves what follows by max(height, width) only.
        behind += length - max(shape[1:])
        positions[1:, start + length :] = positions[0, start + length :] - behind
    return positions


def next_position(positions: Int[np.ndarray, "4 tokens"]) -> int:
    """Where text after these tokens goes on, on all three axes."""
    return int(positions[1:].max()) + 1 if positions.shape[1] else 0
