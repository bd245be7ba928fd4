"""Attention of one new token per sequence: over the prompt that a group shares, and over what the sequence has said so far."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def attend_decode(
    query: Float[Tensor, "sequences heads width"],
    prefix_k: Float[Tensor, "groups prefix kv_heads width"],
    prefix_v: Float[Tensor, "groups prefix kv_heads width"],
    prefix_lengths: Int[Tensor, " groups"],
    own_k: Float[Tensor, "sequences capacity kv_heads width"],
    own_v: Float[Tensor, "sequences capacity kv_heads width"],
    own_length: Int[Tensor, ""],
    scale: float,
) -> Float[Tensor, "sequences heads width"]:
    """Softmax over both caches at once. Sequence s belongs to group s // (sequences / groups)."""
    groups, prefix, kv_heads, width = prefix_k.shape
    sequences, heads, _ = query.shape
    members, share = sequences // groups, heads // kv_heads
    wide = torch.promote_types(query.dtype, torch.float32)
    q_own = query.reshape(sequences, kv_heads, share, width)
    # [groups, kv_heads, members * share, width]
    q_prefix = query.reshape(groups, members, kv_heads, share, width).transpose(1, 2).flatten(2, 3)
    on_prefix = torch.matmul(q_prefix, prefix_k.permute(0, 2, 3, 1)).to(wide)
    on_own = torch.matmul(q_own, own_k.permute(0, 2, 3, 1)).to(wide)
    beyond = torch.arange(prefix, device=query.device) >= prefix_lengths[:, None]
    on_prefix = on_prefix.masked_fill(beyond[:, None, None], -torch.inf)
    on_own = on_own.masked_fill(torch.arange(own_k.shape[1], device=query.device) >= own_length, -torch.inf)
    regrouped = (
        on_prefix.reshape(groups, kv_heads, members, share, prefix).transpose(1, 2).reshape(*q_own.shape[:3], prefix)
    )
    weights = torch.cat([regrouped, on_own], -1).mul_(scale).softmax(-1).to(query.dtype)
    to_prefix, to_own = weights.split([prefix, own_k.shape[1]], -1)
    to_prefix = to_prefix.reshape(groups, members, kv_heads, share, prefix).transpose(1, 2).flatten(2, 3)
    from_prefix = torch.matmul(to_prefix, prefix_v.transpose(1, 2))
    from_prefix = from_prefix.reshape(groups, kv_heads, members, share, width).transpose(1, 2).reshape(q_own.shape)
    return (from_prefix + torch.matmul(to_own, own_v.transpose(1, 2))).reshape(sequences, heads, width)
