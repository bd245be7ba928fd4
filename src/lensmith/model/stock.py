"""Packs through a forward pass that knows none: each sample a row of its own, padded to the longest, as transformers has it.

The way of a model that is not an Engine (lensmith.model.unsloth). It computes what an Engine computes, with padding on top;
tests/reference/test_stock.py compares the two, loss and gradients.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lensmith.types import IGNORE, Pack


def stock_logprob(model: Any, pack: Pack) -> Float[Tensor, ""]:
    """The sum of the log-probabilities of a pack's learned tokens, by the model's own loss. Its gradient is the sum's.

    Raises ValueError for a pack whose samples share a prefix.
    """
    batch = {
        name: tensor.to(model.device, non_blocking=True) for name, tensor in stock_batch(pack, model.config).items()
    }
    # The mean over the labels that are not IGNORE; a sample's first token, which nothing predicts, is never learned.
    mean = model(**batch, use_cache=False).loss
    return -mean * int((pack.labels != IGNORE).sum())


def stock_batch(pack: Pack, config: Any) -> dict[str, Tensor]:
    """Keyword arguments of a stock forward: ids, mask, labels and token types [samples, longest], pixels and their grids.

    Padding stands on the right, masked and not learned. Raises ValueError for a pack whose samples share a prefix.
    """
    if any(segment.parent is not None for segment in pack.segments):
        raise ValueError("samples of this pack share a prefix, and rows of a batch cannot: set pack.share_prefix=false")
    longest = max(segment.length for segment in pack.segments)
    shape = (len(pack.segments), longest)
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORE)
    for row, segment in enumerate(pack.segments):
        piece = slice(segment.start, segment.stop)
        ids[row, : segment.length], labels[row, : segment.length] = pack.input_ids[piece], pack.labels[piece]
        mask[row, : segment.length] = 1
    types = (ids == config.image_token_id).long() + 2 * (ids == config.video_token_id).long()
    rows = {"input_ids": ids, "attention_mask": mask, "labels": labels, "mm_token_type_ids": types * mask}
    return rows | _pictures(pack, config)


def _pictures(pack: Pack, config: Any) -> dict[str, Tensor]:
    """Pixels and grids, those of images and of moments of videos apart, each in the order of their tokens."""
    if not len(pack.grids):
        return {}
    grids = pack.grids.numpy()
    patches = grids.prod(1)
    ids = pack.input_ids.numpy()
    places = np.flatnonzero(np.isin(ids, (config.image_token_id, config.video_token_id)))
    tokens = patches // config.vision_config.spatial_merge_size**2
    shown = ids[places[np.cumsum(tokens) - tokens]]
    owners = np.repeat(np.arange(len(grids)), patches)
    found: dict[str, Tensor] = {}
    for token, pixels, name in (
        (config.image_token_id, "pixel_values", "image_grid_thw"),
        (config.video_token_id, "pixel_values_videos", "video_grid_thw"),
    ):
        chosen = np.flatnonzero(shown == token)
        if len(chosen):
            found[pixels] = pack.pixels[torch.from_numpy(np.isin(owners, chosen))]
            found[name] = pack.grids[torch.from_numpy(chosen)]
    return found
