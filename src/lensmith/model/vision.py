"""The image tower over all pictures of a pack at once: one attention call per block, no synchronisation, no copies.

Stock transformers calls attention once per image per block and reads the lengths back from the GPU each time. The blocks
themselves (norms, projections, adapters on them) are the stock modules; only their order of calls is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.qwen3_vl import modeling_qwen3_vl
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from lensmith.model.attention import Layout, Run, attend, build_layout


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """What the decoder takes from the tower; row i belongs to the pack's i-th image token."""

    tokens: Float[Tensor, "image_tokens width"]
    """Stand in for the embeddings of the image tokens."""
    deepstack: tuple[Float[Tensor, "image_tokens width"], ...]
    """Added to the hidden states behind the first decoder layers, one each."""


def encode_images(
    tower: Any, pixels: Float[Tensor, "patches values"], grids: Int[Tensor, "images 3"], *, recompute: bool = False
) -> ImageFeatures:
    """Features of every image; `grids` is on the CPU, so that nothing waits for the GPU.

    `recompute` keeps only each block's input for the backward pass (for a tower that is trained). A tower whose blocks
    live in host memory has its `visitors` (see lensmith.model.residence).
    """
    device, dtype = pixels.device, tower.patch_embed.proj.weight.dtype
    hidden = _embed_patches(tower, pixels.to(dtype), grids)
    places = get_vision_position_ids(grids, tower.spatial_merge_size).to(device, non_blocking=True)
    rope = tower.rotary_pos_emb(hidden, places)
    layout = _image_layout(grids, device, dtype)
    deepstack = {}
    visitors = getattr(tower, "visitors", None)
    for index, block in enumerate(tower.blocks):
        if visitors is not None:
            visitors.bring(index, index + 1)
        if recompute and torch.is_grad_enabled():
            hidden = checkpoint(_run_block, block, hidden, rope, layout, use_reentrant=False)
        else:
            hidden = _run_block(block, hidden, rope, layout)
        if index in tower.deepstack_visual_indexes:
            level = tower.deepstack_visual_indexes.index(index)
            deepstack[level] = tower.deepstack_merger_list[level](hidden)
    return ImageFeatures(tower.merger(hidden), tuple(deepstack[level] for level in sorted(deepstack)))


def _embed_patches(
    tower: Any, pixels: Float[Tensor, "patches values"], grids: Tensor
) -> Float[Tensor, "patches width"]:
    # A convolution whose stride is its kernel is a matrix product; as Conv3d it was the slowest part of many runs
    # (5-15 times, reported for several torch releases).
    proj = tower.patch_embed.proj
    hidden = nn.functional.linear(pixels, proj.weight.flatten(1), proj.bias)
    corners, weights = get_vision_interpolation_indices_and_weights(
        grids,
        num_grid_per_side=tower.num_grid_per_side,
        mode="bilinear",
        align_corners=True,
        spatial_merge_size=tower.spatial_merge_size,
    )
    corners, weights = corners.to(pixels.device, non_blocking=True), weights.to(pixels.device, non_blocking=True)
    return hidden + (tower.pos_embed(corners) * weights[..., None]).sum(1).to(hidden.dtype)


def _run_block(block: Any, hidden: Tensor, rope: tuple[Tensor, Tensor], layout: Layout) -> Tensor:
    attention = block.attn
    query, key, value = attention.qkv(block.norm1(hidden)).view(len(hidden), 3, attention.num_heads, -1).unbind(1)
    query, key = modeling_qwen3_vl.apply_rotary_pos_emb_vision(query, key, *rope)
    mixed = attend(query, key, value, layout, attention.scaling)
    hidden = hidden + attention.proj(mixed.reshape(len(hidden), -1))
    return hidden + block.mlp(block.norm2(hidden))


def _image_layout(grids: Int[Tensor, "images 3"], device: torch.device, dtype: torch.dtype) -> Layout:
    # Frames do not see each other: one run per frame, as in transformers' get_vision_cu_seqlens.
    lengths = [h * w for t, h, w in grids.tolist() for _ in range(t)]
    stops = np.cumsum(lengths).tolist()
    runs = [Run(n, ((stop - n, stop),)) for n, stop in zip(lengths, stops, strict=True)]
    return build_layout(runs, num_keys=stops[-1], causal=False, device=device, dtype=dtype)
