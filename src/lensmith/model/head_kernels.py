"""RMSNorm and rotary embedding of all heads of queries and keys as one Triton program each way.

A launch costs the host more than these steps cost the GPU: norm of queries, norm of keys and rotation used to be three in
each direction. What is computed is what Qwen3VLTextRMSNorm and apply_rotary_pos_emb compute, with fewer roundings:

    scale   = 1 / sqrt(mean(x^2) + epsilon)                           fp32
    normed  = round(round(x * scale) * weight)                        as the module rounds, to the type of x
    rotated = [n1 cos - n2 sin, n2 cos + n1 sin]                      fp32, rounded once; n1 and n2 are the halves of a head

The way back stays in fp32 from the rotation to the gradient of x. Cosines and sines of a head's halves are the same
(transformers concatenates the angles with themselves), so only the first half is read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lensmith.model.launch import Launcher

BLOCK = 16
"""Heads per program: at width 128 and four warps each lane moves 16 bytes at a time."""


@triton.jit
def norm_rotate(
    query, key, q_weight, k_weight, cos, sin, to_query, to_key, scales, query_stride, key_stride, q_epsilon, k_epsilon,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs (token, block of its query heads or, behind them, of its key heads).

    `query_stride` and `key_stride`: from token to token; heads lie one after the other. The results and `scales` [tokens,
    HEADS + KV_HEADS] are contiguous.
    """
    HALF: tl.constexpr = WIDTH // 2
    QUERY_BLOCKS: tl.constexpr = (HEADS + BLOCK - 1) // BLOCK
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    # The reader of queries; a reader of keys changes all of these.
    source, weight, to, epsilon = query + token * query_stride, q_weight, to_query + token * (HEADS * WIDTH), q_epsilon
    num_heads, first_scale = block * 0 + HEADS, block * 0
    if block >= QUERY_BLOCKS:
        source, weight, to, epsilon = key + token * key_stride, k_weight, to_key + token * (KV_HEADS * WIDTH), k_epsilon
        num_heads, first_scale = block * 0 + KV_HEADS, block * 0 + HEADS
        block -= QUERY_BLOCKS
    head, within = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, HALF)
    real = head < num_heads
    at, inside = head[:, None] * WIDTH + within[None, :], real[:, None]

    x1 = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(source + at + HALF, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 1) / WIDTH + epsilon)
    tl.store(scales + token * (HEADS + KV_HEADS) + first_scale + head, scale, mask=real)

    kind = to.dtype.element_ty
    w1, w2 = tl.load(weight + within).to(tl.float32)[None, :], tl.load(weight + within + HALF).to(tl.float32)[None, :]
    # A product of two 16-bit numbers is exact in fp32: rounding it is multiplying in their type.
    n1 = ((x1 * scale[:, None]).to(kind).to(tl.float32) * w1).to(kind).to(tl.float32)
    n2 = ((x2 * scale[:, None]).to(kind).to(tl.float32) * w2).to(kind).to(tl.float32)
    c = tl.load(cos + token * WIDTH + within).to(tl.float32)[None, :]
    s = tl.load(sin + token * WIDTH + within).to(tl.float32)[None, :]
    tl.store(to + at, (n1 * c - n2 * s).to(kind), mask=inside)
    tl.store(to + at + HALF, (n2 * c + n1 * s).to(kind), mask=inside)


@triton.jit
def norm_rotate_back(
    grad_query, grad_key, query, key, scales, q_weight, k_weight, cos, sin,
    grad_query_stride, grad_key_stride, query_stride, key_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs as in `norm_rotate`. Gradients of what went in take the place of those of what came out.

    No element is written before its whole head has been read: all of them are in the head's sum.
    """
    HALF: tl.constexpr = WIDTH // 2
    QUERY_BLOCKS: tl.constexpr = (HEADS + BLOCK - 1) // BLOCK
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    source, weight, grad = query + token * query_stride, q_weight, grad_query + token * grad_query_stride
    num_heads, first_scale = block * 0 + HEADS, block * 0
    if block >= QUERY_BLOCKS:
        source, weight, grad = key + token * key_stride, k_weight, grad_key + token * grad_key_stride
        num_heads, first_scale = block * 0 + KV_HEADS, block * 0 + HEADS
        block -= QUERY_BLOCKS
    head, within = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, HALF)
    real = head < num_heads
    at, inside = head[:, None] * WIDTH + within[None, :], real[:, None]

    scale = tl.load(scales + token * (HEADS + KV_HEADS) + first_scale + head, mask=real, other=0.0)[:, None]
    hat1 = tl.load(source + at, mask=inside, other=0.0).to(tl.float32) * scale
    hat2 = tl.load(source + at + HALF, mask=inside, other=0.0).to(tl.float32) * scale
    g1 = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    g2 = tl.load(grad + at + HALF, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + token * WIDTH + within).to(tl.float32)[None, :]
    s = tl.load(sin + token * WIDTH + within).to(tl.float32)[None, :]
    # Turned back by the same angles, then through the weight.
    inner1 = (g1 * c + g2 * s) * tl.load(weight + within).to(tl.float32)[None, :]
    inner2 = (g2 * c - g1 * s) * tl.load(weight + within + HALF).to(tl.float32)[None, :]
    along = (tl.sum(inner1 * hat1 + inner2 * hat2, 1) / WIDTH)[:, None]
    kind = grad.dtype.element_ty
    tl.store(grad + at, ((inner1 - hat1 * along) * scale).to(kind), mask=inside)
    tl.store(grad + at + HALF, ((inner2 - hat2 * along) * scale).to(kind), mask=inside)


launch_norm_rotate, launch_norm_rotate_back = Launcher(norm_rotate), Launcher(norm_rotate_back)
