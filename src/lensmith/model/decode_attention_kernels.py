"""The Triton programs of `decode_attention`: parts of the keys first, then all parts of a query merged; and what comes before.

A part is softmax(q k') v over a stretch of the keys, fp32, with the logarithm (base 2) of its sum of exponentials: enough to
weigh the parts exactly. Stretches are cut by capacity, which a CUDA graph knows; those beyond the length, which only the
device knows, end at once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend_parts(
    query, prefix_k, prefix_v, prefix_lengths, own_k, own_v, own_lengths, parts, weights, scale_log2, query_stride,
    prefix_unit, prefix_key, prefix_head, own_unit, own_key, own_head, own_lengths_stride,
    prefix_chunk, own_chunk, prefix_splits, own_splits, group_tiles, num_groups, group_size,
    KV_HEADS: tl.constexpr, REPEATS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Programs (kv head, stretch of keys, group and tile of its queries), and then the same for each sequence alone.

    Rows of a program are all queries of its sequences that read one kv head: REPEATS neighbouring heads per sequence.
    """
    kv_head, rest = tl.program_id(0) % KV_HEADS, tl.program_id(0) // KV_HEADS
    shared = num_groups * group_tiles * prefix_splits
    alone = rest - shared
    # The reader of a sequence's own keys; a reader of its group's keys changes all of these.
    k, v, key_stride, chunk = own_k, own_v, own_key, own_chunk
    unit, split = alone // own_splits, alone % own_splits
    place, base = prefix_splits + split, unit.to(tl.int64) * own_unit + kv_head * own_head
    first_sequence, first_row, num_rows = unit, unit * 0, unit * 0 + REPEATS
    lengths = own_lengths + unit * own_lengths_stride
    if rest < shared:
        k, v, key_stride, chunk = prefix_k, prefix_v, prefix_key, prefix_chunk
        split = rest % prefix_splits
        unit, first_row = rest // prefix_splits // group_tiles, (rest // prefix_splits) % group_tiles * ROWS
        place, base = split, unit.to(tl.int64) * prefix_unit + kv_head * prefix_head
        first_sequence, num_rows = unit * group_size, unit * 0 + group_size * REPEATS
        lengths = prefix_lengths + unit
    first_key = split * chunk
    last_key = tl.minimum(first_key + chunk, tl.load(lengths))

    rows, within = first_row + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    real = rows < num_rows
    sequence, head = first_sequence + rows // REPEATS, kv_head * REPEATS + rows % REPEATS
    result = (sequence * (KV_HEADS * REPEATS) + head) * (prefix_splits + own_splits) + place
    if first_key >= last_key:
        tl.store(weights + result, tl.full((ROWS,), float("-inf"), tl.float32), mask=real)
    else:
        at = sequence * query_stride + head * WIDTH
        q = tl.load(query + at[:, None] + within[None, :], mask=real[:, None], other=0.0)
        most, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, WIDTH), tl.float32)
        for start in range(first_key, last_key, KEYS):
            keys = start + tl.arange(0, KEYS)
            inside = keys < last_key
            tile = base + keys.to(tl.int64)[:, None] * key_stride + within[None, :]
            k_tile = tl.load(k + tile, mask=inside[:, None], other=0.0)
            v_tile = tl.load(v + tile, mask=inside[:, None], other=0.0)
            scores = tl.dot(q, tl.trans(k_tile), input_precision="ieee") * scale_log2
            scores = tl.where(inside[None, :], scores, float("-inf"))
            higher = tl.maximum(most, tl.max(scores, 1))
            shares, shrink = tl.exp2(scores - higher[:, None]), tl.exp2(most - higher)
            total = total * shrink + tl.sum(shares, 1)
            acc = acc * shrink[:, None] + tl.dot(shares.to(v_tile.dtype), v_tile, input_precision="ieee")
            most = higher
        out = result.to(tl.int64)[:, None] * WIDTH + within[None, :]
        tl.store(parts + out, acc / total[:, None], mask=real[:, None])
        tl.store(weights + result, most + tl.log2(total), mask=real)


@triton.jit
def merge_parts(parts, weights, out, num_splits, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    """One query: its parts, each weighed by its share of the sum of exponentials."""
    query, split, within = tl.program_id(0), tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    weight = tl.load(weights + query * num_splits + split, mask=split < num_splits, other=float("-inf"))
    share = tl.exp2(weight - tl.max(weight, 0))
    at = (query * num_splits + split).to(tl.int64)[:, None] * WIDTH + within[None, :]
    # Parts without keys were not written: whatever stands there must not be multiplied, even by zero.
    part = tl.load(parts + at, mask=(weight > float("-inf"))[:, None], other=0.0)
    share /= tl.sum(share, 0)
    merged = tl.sum(part * share[:, None], 0)
    tl.store(out + query * WIDTH + within, merged.to(out.dtype.element_ty))


@triton.jit
def place_token(
    query, key, value, q_weight, k_weight, cos, sin, rotated, own_k, own_v, position, epsilon,
    query_stride, key_stride, value_stride, own_unit, own_key, own_head, position_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One head of one sequence: queries to `rotated`, keys and values to their place in the cache."""
    sequence, head, within = tl.program_id(0), tl.program_id(1), tl.arange(0, WIDTH)
    at = tl.load(position + sequence * position_stride).to(tl.int64)
    cache = sequence.to(tl.int64) * own_unit + at * own_key
    if head >= HEADS + KV_HEADS:
        head = head - HEADS - KV_HEADS
        tl.store(
            own_v + cache + head * own_head + within, tl.load(value + sequence * value_stride + head * WIDTH + within)
        )
    else:
        source, weight = query + sequence * query_stride + head * WIDTH, q_weight
        to = rotated + (sequence * HEADS + head) * WIDTH
        if head >= HEADS:
            source, weight = key + sequence * key_stride + (head - HEADS) * WIDTH, k_weight
            to = own_k + cache + (head - HEADS) * own_head
        # The other half of the head is read again instead of being moved between lanes.
        half: tl.constexpr = WIDTH // 2
        other = (within + half) % WIDTH
        x, x_other = tl.load(source + within), tl.load(source + other)
        scale = tl.rsqrt(tl.sum(x.to(tl.float32) * x.to(tl.float32), 0) / WIDTH + epsilon)
        y = (x.to(tl.float32) * scale).to(x.dtype) * tl.load(weight + within)
        y_other = (x_other.to(tl.float32) * scale).to(x.dtype) * tl.load(weight + other)
        turned = tl.where(within < half, -y_other.to(tl.float32), y_other.to(tl.float32))
        c = tl.load(cos + sequence * WIDTH + within).to(tl.float32)
        s = tl.load(sin + sequence * WIDTH + within).to(tl.float32)
        tl.store(to + within, (y.to(tl.float32) * c + turned * s).to(x.dtype))
