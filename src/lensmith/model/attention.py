"""Attention over a pack: every query run reads its ancestors and itself, nothing else.

A pack is cut into *runs*: consecutive queries with one key range (the prefix they share, if any, and their own segment
up to the last of them). Two forms compute the same numbers:

* `varlen`: one call of torch's variable-length flash kernel over concatenated keys; 16-bit types on Ampere or newer.
* `padded`: runs of similar length are stacked and go through scaled_dot_product_attention; any device, any precision.

Merging two attention parts by autograd through (out, lse) would give right losses and wrong gradients, because flash
kernels drop the gradient of the lse; concatenating keys needs no merge at all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lensmith.model.quant import has_triton
from lensmith.types import Segment

ToDevice = Callable[[np.ndarray], Tensor]

BUCKET_GROWTH = 1.25
"""Runs share a padded bucket while the longest is at most this many times the shortest."""

SHORT_RUN = 64
"""On a CPU runs up to this long go through plain products: 5.2 ms instead of 12.0, forward and backward, for 142 runs of
19 queries and 28 keys (two cores; torch's flash kernel has blocks of 32 rows and more)."""


@dataclass(frozen=True, slots=True)
class Run:
    """Queries `first .. first + length - 1` of the query tensor and the rows of the key tensor that they read."""

    length: int
    keys: tuple[tuple[int, int], ...]
    """Half-open row ranges, ancestors first; the queries are aligned with the end of the last range."""

    @property
    def num_keys(self) -> int:
        return sum(stop - start for start, stop in self.keys)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Runs of similar length, stacked for the padded form."""

    queries: Int[Tensor, "runs longest_q"]
    keys: Int[Tensor, "runs longest_k"]
    mask: Bool[Tensor, "runs 1 longest_q longest_k"] | None
    """None where all runs are equally long and attend to everything."""
    rows: Int[Tensor, " queries"]
    """Where in the flattened output of this bucket its real queries stand."""


@dataclass(frozen=True, slots=True)
class Varlen:
    """Layout for the flash kernel, as index tensors on its device."""

    causal: bool
    cu_queries: Int[Tensor, " runs_and_one"]
    cu_keys: Int[Tensor, " runs_and_one"]
    max_queries: int
    max_keys: int
    gather: Int[Tensor, " keys"] | None
    """Rows of the key tensor in the order of the runs; None where that is the tensor as it stands."""
    readers: tuple[Int[Tensor, " keys"], Int[Tensor, " rows_and_one"]] | None
    """The way back of `gather`, None with it: its places sorted by the row that they read, and where each row's start."""


@dataclass(frozen=True, slots=True)
class Padded:
    """Layout for stacked runs."""

    buckets: tuple[Bucket, ...]
    order: Int[Tensor, " queries"] | None
    """Puts the buckets' queries back into pack order; None where they are in it."""


Layout = Varlen | Padded
"""Which keys each query of a pack reads."""


def segment_runs(segments: Sequence[Segment]) -> list[Run]:
    """One run per segment: all of its queries."""
    return [Run(s.length, (*_ancestors(segments, s), (s.start, s.stop))) for s in segments]


def kept_runs(segments: Sequence[Segment], kept: Int[np.ndarray, " kept"]) -> list[Run]:
    """Runs of consecutive kept rows inside a segment, for a layer whose output is needed at `kept` only."""
    runs: list[Run] = []
    starts = np.array([s.start for s in segments])
    breaks = np.flatnonzero(np.diff(kept) != 1) + 1
    for piece in np.split(kept, breaks):
        owner = np.searchsorted(starts, piece, side="right") - 1
        for rows in np.split(piece, np.flatnonzero(np.diff(owner)) + 1):
            if len(rows):
                segment = segments[int(np.searchsorted(starts, rows[0], side="right")) - 1]
                own = (segment.start, int(rows[-1]) + 1)
                runs.append(Run(len(rows), (*_ancestors(segments, segment), own)))
    return runs


def _ancestors(segments: Sequence[Segment], segment: Segment) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    while segment.parent is not None:
        segment = segments[segment.parent]
        ranges.insert(0, (segment.start, segment.stop))
    return ranges


def build_layout(
    runs: Sequence[Run], *, num_keys: int, causal: bool, device: torch.device, dtype: torch.dtype
) -> Layout:
    """Index tensors for `runs`, in query order, over a key tensor of `num_keys` rows; on `device`, for the form it uses."""
    tensor = lambda array: torch.from_numpy(array).to(device, non_blocking=True)  # noqa: E731
    build = _build_varlen if varlen_available(device, dtype) else _build_padded
    return build(runs, num_keys, causal, tensor)


def _key_rows(runs: Sequence[Run]) -> list[Int[np.ndarray, " keys"]]:
    return [np.concatenate([np.arange(*span) for span in run.keys]) for run in runs]


def _build_varlen(runs: Sequence[Run], num_keys: int, causal: bool, tensor: ToDevice) -> Varlen:
    gather = np.concatenate(_key_rows(runs))
    in_order = len(gather) == num_keys and bool((np.diff(gather) == 1).all())
    queries, keys = [run.length for run in runs], [run.num_keys for run in runs]
    readers = None
    if not in_order:
        order = np.argsort(gather, kind="stable").astype(np.int32)
        starts = np.searchsorted(gather[order], np.arange(num_keys + 1)).astype(np.int32)
        readers = tensor(order), tensor(starts)
    return Varlen(
        causal=causal,
        cu_queries=tensor(np.cumsum([0, *queries], dtype=np.int32)),
        cu_keys=tensor(np.cumsum([0, *keys], dtype=np.int32)),
        max_queries=max(queries),
        max_keys=max(keys),
        gather=None if in_order else tensor(gather),
        readers=readers,
    )


def _build_padded(runs: Sequence[Run], num_keys: int, causal: bool, tensor: ToDevice) -> Padded:
    lengths, key_rows = np.array([run.length for run in runs]), _key_rows(runs)
    starts = np.cumsum(lengths) - lengths
    members = _buckets(lengths, np.array([run.num_keys for run in runs]))
    rows = np.split(np.arange(lengths.sum()), starts[1:])
    order = np.concatenate([rows[i] for bucket in members for i in bucket])
    return Padded(
        buckets=tuple(
            _stack_bucket(lengths[bucket], starts[bucket], [key_rows[i] for i in bucket], causal, tensor)
            for bucket in members
        ),
        order=tensor(np.argsort(order)) if (np.diff(order) != 1).any() else None,
    )


def _buckets(lengths_q: Int[np.ndarray, " runs"], lengths_k: Int[np.ndarray, " runs"]) -> list[np.ndarray]:
    """Run numbers grouped so that padding stays under BUCKET_GROWTH per side (a few tokens are always allowed)."""
    level = lambda lengths: np.ceil(np.log(np.maximum(lengths, 32)) / np.log(BUCKET_GROWTH)).astype(int)  # noqa: E731
    keys = level(lengths_q) * 1000 + level(lengths_k)
    return [np.flatnonzero(keys == key) for key in np.unique(keys)]


def _stack_bucket(
    lengths: np.ndarray, starts: np.ndarray, key_rows: list[np.ndarray], causal: bool, tensor: ToDevice
) -> Bucket:
    counts = np.array([len(rows) for rows in key_rows])
    i, j = np.arange(lengths.max()), np.arange(counts.max())
    # Padding repeats row 0 and is masked (keys) or dropped (queries).
    real_q, real_k = i < lengths[:, None], j < counts[:, None]
    queries = np.where(real_q, starts[:, None] + i, 0)
    flat, first = np.concatenate(key_rows), np.cumsum(counts) - counts
    keys = np.where(real_k, flat[np.minimum(first[:, None] + j, len(flat) - 1)], 0)
    mask = np.broadcast_to(real_k[:, None], (len(lengths), len(i), len(j)))
    if causal:
        # Bottom-right: the last query sees every key.
        mask = mask & (j - i[:, None] <= (counts - lengths)[:, None, None])
    # A padded query would see nothing and turn into NaN, so it sees key 0; its output is dropped.
    mask = mask | (~real_q[:, :, None] & (j == 0))
    rows = np.flatnonzero(real_q.ravel())
    return Bucket(tensor(queries), tensor(keys), None if mask.all() else tensor(mask[:, None]), tensor(rows))


def attend(
    query: Float[Tensor, "queries heads width"],
    key: Float[Tensor, "keys kv_heads width"],
    value: Float[Tensor, "keys kv_heads width"],
    layout: Layout,
    scale: float,
) -> Float[Tensor, "queries heads width"]:
    """Attention of every run over its own keys. Gradients reach query, key and value in both forms."""
    attend_form = _attend_varlen if isinstance(layout, Varlen) else _attend_padded
    return attend_form(query, key, value, layout, scale)  # type: ignore[arg-type]


def _attend_varlen(query: Tensor, key: Tensor, value: Tensor, layout: Varlen, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if layout.gather is not None:
        key, value = key[layout.gather], value[layout.gather]
    call: Callable[..., Any] = varlen_attn  # its keywords differ between releases
    return call(
        query,
        key,
        value,
        layout.cu_queries,
        layout.cu_keys,
        layout.max_queries,
        layout.max_keys,
        scale=scale,
        window_size=(-1, 0) if layout.causal else (-1, -1),
        **_grouped_heads_flag(),
    )


@dataclass(slots=True)
class Attended:
    """What the backward pass of one `attend_by_hand` reads."""

    layout: Layout
    scale: float
    inputs: tuple[Tensor, Tensor, Tensor]
    """Query, key and value as the kernel got them: gathered, where the layout gathers."""
    out: Tensor
    lse: Tensor | None = None
    random: tuple[Tensor, Tensor] | None = None
    """What the flash kernel hands to its backward for dropout, of which there is none."""


def attend_by_hand(
    query: Float[Tensor, "queries heads width"],
    key: Float[Tensor, "keys kv_heads width"],
    value: Float[Tensor, "keys kv_heads width"],
    layout: Layout,
    scale: float,
    *,
    keeps: bool,
) -> tuple[Float[Tensor, "queries heads width"], Attended | None]:
    """`attend` outside of any graph, and what `attend_backward` needs if `keeps`.

    The flash kernels are called as torch's varlen_attn calls them, without the layers of Python around them. The padded
    form keeps a graph of its own from query, key and value to the output.
    """
    if isinstance(layout, Varlen):
        return _flash_by_hand(query, key, value, layout, scale, keeps=keeps)
    if not keeps:
        return attend(query, key, value, layout, scale), None
    with torch.enable_grad():
        inputs = (query.detach().requires_grad_(), key.detach().requires_grad_(), value.detach().requires_grad_())
        out = attend(*inputs, layout, scale)
    return out.detach(), Attended(layout, scale, inputs, out)


def attend_backward(grad: Float[Tensor, "queries heads width"], attended: Attended) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; once."""
    if isinstance(attended.layout, Varlen):
        return _flash_backward(grad, attended, attended.layout)
    return torch.autograd.grad(attended.out, attended.inputs, grad)  # type: ignore[return-value]


def _flash_by_hand(
    query: Tensor, key: Tensor, value: Tensor, layout: Varlen, scale: float, *, keeps: bool
) -> tuple[Tensor, Attended | None]:
    if layout.gather is not None:
        key, value = key.index_select(0, layout.gather), value.index_select(0, layout.gather)
    out, lse, *random = torch.ops.aten._flash_attention_forward(
        query, key, value, *_flash_lengths(layout), 0.0, layout.causal, False, scale=scale, **_flash_window(layout)
    )[:4]
    if not keeps:
        return out, None
    return out, Attended(layout, scale, (query, key, value), out, lse, tuple(random))  # type: ignore[arg-type]


def _flash_backward(grad: Tensor, attended: Attended, layout: Varlen) -> tuple[Tensor, Tensor, Tensor]:
    assert attended.random is not None, "set by _flash_by_hand"
    grad_query, grad_key, grad_value = torch.ops.aten._flash_attention_backward(
        grad,
        *attended.inputs,
        attended.out,
        attended.lse,
        *_flash_lengths(layout),
        0.0,
        layout.causal,
        *attended.random,
        scale=attended.scale,
        **_flash_window(layout),
    )
    if layout.gather is not None:
        grad_key, grad_value = ungather(grad_key, grad_value, layout)
    return grad_query, grad_key, grad_value


def ungather(
    grad_key: Float[Tensor, "gathered kv_heads width"],
    grad_value: Float[Tensor, "gathered kv_heads width"],
    layout: Varlen,
) -> tuple[Float[Tensor, "rows kv_heads width"], Float[Tensor, "rows kv_heads width"]]:
    """Gradients of gathered keys and values, summed in fp32 to the rows that they were gathered from, and rounded once."""
    assert layout.gather is not None, "asked for by the caller"
    assert layout.readers is not None, "comes with it"
    order, starts = layout.readers
    shape = (len(starts) - 1, *grad_key.shape[1:])
    if not _sums_at_once(grad_key):
        # In 16 bits index_add_ would round after each branch. (The backward pass of indexing sorts its rows instead.)
        exact = torch.promote_types(grad_key.dtype, torch.float32)
        summed = [grad.new_zeros(shape, dtype=exact) for grad in (grad_key, grad_value)]
        pairs = zip(summed, (grad_key, grad_value), strict=True)
        key, value = (total.index_add_(0, layout.gather, grad.to(exact)).to(grad.dtype) for total, grad in pairs)
        return key, value
    from lensmith.model.attention_kernels import BLOCK, launch_add_shared

    sources = [grad.flatten(1) for grad in (grad_key, grad_value)]
    key, value = grad_key.new_empty(shape), grad_value.new_empty(shape)
    width = sources[0].shape[1]
    grid, strides = (shape[0], -(-width // BLOCK)), [source.stride(0) for source in sources]
    launch_add_shared(grid, (*sources, order, starts, key, value), strides, (), (width, BLOCK))
    return key, value


def _sums_at_once(grad: Tensor) -> bool:
    """Whether one kernel of ours does it: Triton's, so on Linux."""
    return grad.is_cuda and has_triton()


def _flash_lengths(layout: Varlen) -> tuple[Tensor, Tensor, int, int]:
    return layout.cu_queries, layout.cu_keys, layout.max_queries, layout.max_keys


def _flash_window(layout: Varlen) -> dict[str, int]:
    return {"window_size_left": -1, "window_size_right": 0 if layout.causal else -1}


@cache
def _grouped_heads_flag() -> dict[str, bool]:
    """torch 2.11 takes grouped key heads as they come; later releases want to be told."""
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def _attend_padded(query: Tensor, key: Tensor, value: Tensor, layout: Padded, scale: float) -> Tensor:
    kv_heads = key.shape[1]
    outputs = []
    for bucket in layout.buckets:
        runs, longest = bucket.queries.shape
        # Query heads that share a key head become more queries of that head: nothing is copied, products are larger.
        # [runs, kv_heads, group * longest, width]
        q = _take(query, bucket.queries).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        k, v = (_take(rows, bucket.keys).transpose(1, 2) for rows in (key, value))
        groups = q.shape[2] // longest
        mask = None if bucket.mask is None else bucket.mask.repeat(1, 1, groups, 1)
        if max(longest, bucket.keys.shape[1]) <= SHORT_RUN and q.device.type == "cpu":
            out = _attend_short(q, k, v, mask, scale)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        out = out.unflatten(2, (groups, longest)).permute(0, 3, 1, 2, 4).reshape(runs * longest, *query.shape[1:])
        outputs.append(out if len(bucket.rows) == len(out) else out.index_select(0, bucket.rows))
    stacked = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return stacked if layout.order is None else stacked.index_select(0, layout.order)


def _attend_short(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = torch.matmul(q * scale, k.transpose(-1, -2))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.matmul(scores.softmax(-1), v)


def _take(rows: Float[Tensor, "rows heads width"], index: Int[Tensor, "runs longest"]) -> Tensor:
    # index_select: its backward adds rows, that of plain indexing sorts them first.
    return rows.index_select(0, index.flatten()).unflatten(0, tuple(index.shape))


@cache
def varlen_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's variable-length flash kernel runs here: 16-bit types on compute capability 8.0 or newer."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
