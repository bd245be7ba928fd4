"""Attention of one new token per sequence: to the prefix that its group shares, and to what it has said itself.

Sequence s belongs to group s // (sequences // groups). The prefix is kept and read once per group, however many sequences
continue it; the softmax is over both together, exactly. How long each part is, only the device knows: the work is laid out by
capacity and ends at the length, so `attend_decode` and `write_decode` may be captured in a CUDA graph.

The plain form below is the reference, and what runs on a CPU and in float64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.models.qwen3_vl import modeling_qwen3_vl

from lensmith.model.quant import has_triton

PROGRAMS = 264
"""Two for each multiprocessor of an H100. Keys are cut into so many stretches that there are about as many programs."""
KEYS = 64
"""Keys per step of a program, and the shortest stretch."""
MOST_SPLITS = 64
MOST_ROWS = 64
"""Queries that one program takes; larger groups go in tiles."""


def attend_decode(
    query: Float[Tensor, "sequences heads width"],
    prefix_k: Float[Tensor, "groups prefix kv_heads width"],
    prefix_v: Float[Tensor, "groups prefix kv_heads width"],
    prefix_lengths: Int[Tensor, " groups"],
    own_k: Float[Tensor, "sequences capacity kv_heads width"],
    own_v: Float[Tensor, "sequences capacity kv_heads width"],
    own_length: Int[Tensor, " one_or_sequences"],
    scale: float,
) -> Float[Tensor, "sequences heads width"]:
    """Softmax attention over the first `prefix_lengths` keys of the group and the first `own_length` of the sequence.

    Lengths are int32 on the device; `own_length` has one entry for all or one each. Every sequence needs one key at least.
    What stands in the caches beyond the lengths does not matter, even NaN. Keys and values must be laid out alike.
    """
    if len(own_k) % len(prefix_k) or own_length.numel() not in (1, len(own_k)):
        raise ValueError(
            f"attend_decode: {len(own_k)} sequences, {len(prefix_k)} groups and {own_length.numel()} own lengths; sequences "
            "must be a multiple of groups, and lengths 1 or one per sequence. Fill the last group up with copies."
        )
    arguments = (query, prefix_k, prefix_v, prefix_lengths, own_k, own_v, own_length, scale)
    return _attend_parts(*arguments) if reads_to_length(query) else attend_plainly(*arguments)


def attend_plainly(
    query: Float[Tensor, "sequences heads width"],
    prefix_k: Float[Tensor, "groups prefix kv_heads width"],
    prefix_v: Float[Tensor, "groups prefix kv_heads width"],
    prefix_lengths: Int[Tensor, " groups"],
    own_k: Float[Tensor, "sequences capacity kv_heads width"],
    own_v: Float[Tensor, "sequences capacity kv_heads width"],
    own_length: Int[Tensor, " one_or_sequences"],
    scale: float,
) -> Float[Tensor, "sequences heads width"]:
    """See `attend_decode`; products in the type of the caches, the softmax in fp32 (float64 in float64)."""
    (sequences, heads, width), groups, kv_heads = query.shape, len(prefix_k), own_k.shape[2]
    exact = torch.promote_types(query.dtype, torch.float32)
    rows = query.view(groups, sequences // groups, kv_heads, heads // kv_heads, width)
    own_rows = query.view(sequences, kv_heads, heads // kv_heads, width)

    def valid(lengths: Tensor, capacity: int) -> Tensor:
        return torch.arange(capacity, device=query.device) < lengths.view(-1, 1)

    in_prefix, in_own = valid(prefix_lengths, prefix_k.shape[1]), valid(own_length, own_k.shape[1])
    scores = torch.einsum("gnkrw,gpkw->gnkrp", rows, prefix_k).to(exact).flatten(0, 1)
    own_scores = torch.einsum("skrw,sckw->skrc", own_rows, own_k).to(exact)
    scores = scores.masked_fill(~in_prefix.repeat_interleave(sequences // groups, 0)[:, None, None], -math.inf)
    own_scores = own_scores.masked_fill(~in_own[:, None, None], -math.inf)
    shares = (torch.cat([scores, own_scores], dim=-1) * scale).softmax(-1).to(query.dtype)
    prefix_shares, own_shares = shares.split([prefix_k.shape[1], own_k.shape[1]], dim=-1)
    # Zero times what nobody wrote may be NaN.
    prefix_v, own_v = (
        v.masked_fill(~inside[:, :, None, None], 0) for v, inside in ((prefix_v, in_prefix), (own_v, in_own))
    )
    mixed = torch.einsum("gnkrp,gpkw->gnkrw", prefix_shares.unflatten(0, (groups, -1)), prefix_v).flatten(0, 1)
    return (mixed + torch.einsum("skrc,sckw->skrw", own_shares, own_v)).flatten(1, 2)


def write_decode(
    query: Float[Tensor, "sequences heads width"],
    key: Float[Tensor, "sequences kv_heads width"],
    value: Float[Tensor, "sequences kv_heads width"],
    q_norm: Any,
    k_norm: Any,
    rope: tuple[Float[Tensor, "sequences width"], Float[Tensor, "sequences width"]],
    own_k: Float[Tensor, "sequences capacity kv_heads width"],
    own_v: Float[Tensor, "sequences capacity kv_heads width"],
    position: Int[Tensor, " one_or_sequences"],
) -> Float[Tensor, "sequences heads width"]:
    """RMS norm and rotary embedding of queries and keys; keys and values to `position` of the caches. Gives the queries.

    `position` is the number of entries before this token. Nothing checks it on the device: it must be below the capacity.
    """
    cos, sin = rope
    if not reads_to_length(query):
        query, key = modeling_qwen3_vl.apply_rotary_pos_emb(q_norm(query), k_norm(key), cos, sin)
        rows, places = torch.arange(len(query), device=query.device), position.expand(len(query)).long()
        own_k[rows, places], own_v[rows, places] = key.to(own_k.dtype), value.to(own_v.dtype)
        return query
    from lensmith.model.decode_attention_kernels import place_token

    query, key, value = (_heads_together(rows) for rows in (query, key, value))
    (sequences, heads, width), kv_heads = query.shape, key.shape[1]
    rotated = query.new_empty(query.shape)
    launch: Any = place_token[(sequences, heads + 2 * kv_heads)]
    launch(
        query, key, value, q_norm.weight, k_norm.weight, cos.contiguous(), sin.contiguous(), rotated, own_k, own_v,
        position, q_norm.variance_epsilon, query.stride(0), key.stride(0), value.stride(0), *_alike(own_k, own_v),
        int(position.numel() > 1), HEADS=heads, KV_HEADS=kv_heads, WIDTH=width, num_warps=1,
    )  # fmt: skip
    return rotated


def reads_to_length(query: Tensor) -> bool:
    """Whether the kernels, which end at the lengths, take this: on a GPU (or interpreted), no float64, width a power of 2."""
    if not has_triton() or query.dtype is torch.float64 or query.shape[-1] < 16 or query.shape[-1].bit_count() != 1:
        return False
    import triton

    return query.is_cuda or triton.knobs.runtime.interpret  # pyright: ignore[reportAttributeAccessIssue]


def _heads_together(rows: Tensor) -> Tensor:
    """Heads of a row one after the other, as views of a stacked projection have them; a copy where they are not."""
    return rows if rows.stride()[1:] == (rows.shape[2], 1) else rows.contiguous()


def _alike(k: Tensor, v: Tensor) -> tuple[int, int, int]:
    """Distance of sequences, of keys and of heads in both caches."""
    if k.stride() != v.stride() or k.stride(3) != 1:
        raise ValueError(
            f"attend_decode: keys have strides {k.stride()} and values {v.stride()}; both must be the same, with 1 at the "
            "end. Make both caches in one way."
        )
    return k.stride(0), k.stride(1), k.stride(2)


def _stretches(capacity: int, readers: int) -> tuple[int, int]:
    """Into how many stretches a cache is cut that so many programs read, and the keys in each."""
    steps = max(1, math.ceil(capacity / KEYS))
    steps_each = math.ceil(steps / min(steps, MOST_SPLITS, math.ceil(PROGRAMS / readers)))
    return math.ceil(steps / steps_each), steps_each * KEYS


def _attend_parts(
    query: Tensor, prefix_k: Tensor, prefix_v: Tensor, prefix_lengths: Tensor, own_k: Tensor, own_v: Tensor,
    own_length: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    from lensmith.model.decode_attention_kernels import attend_parts, merge_parts

    query = _heads_together(query)
    (sequences, heads, width), groups, kv_heads = query.shape, len(prefix_k), own_k.shape[2]
    group_size, repeats = sequences // groups, heads // kv_heads
    # 16 rows are the least that tensor cores take.
    rows = min(MOST_ROWS, max(16, 1 << (group_size * repeats - 1).bit_length()))
    tiles = math.ceil(group_size * repeats / rows)
    prefix_splits, prefix_chunk = _stretches(prefix_k.shape[1], groups * tiles * kv_heads)
    own_splits, own_chunk = _stretches(own_k.shape[1], sequences * kv_heads)
    splits = prefix_splits + own_splits
    parts = query.new_empty(sequences, heads, splits, width, dtype=torch.float32)
    weights = query.new_empty(sequences, heads, splits, dtype=torch.float32)
    launch: Any = attend_parts[(kv_heads * (groups * tiles * prefix_splits + sequences * own_splits),)]
    launch(
        query, prefix_k, prefix_v, prefix_lengths, own_k, own_v, own_length, parts, weights, scale / math.log(2),
        query.stride(0), *_alike(prefix_k, prefix_v), *_alike(own_k, own_v), int(own_length.numel() > 1),
        prefix_chunk, own_chunk, prefix_splits, own_splits, tiles, groups, group_size,
        KV_HEADS=kv_heads, REPEATS=repeats, WIDTH=width, ROWS=rows, KEYS=KEYS, num_warps=4,
    )  # fmt: skip
    out = query.new_empty(query.shape)
    merge: Any = merge_parts[(sequences * heads,)]
    merge(parts, weights, out, splits, WIDTH=width, SPLITS=1 << (splits - 1).bit_length(), num_warps=2)
    return out
