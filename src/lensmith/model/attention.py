"""Attention over a pack: every query run reads its ancestors and itself, nothing else.

A pack is cut into *runs*: consecutive queries with one key range (the prefix they share, if any, and their own segment
up to the last of them). Three forms compute the same numbers:

* `varlen`: one call of torch's variable-length flash kernel over concatenated keys; 16-bit types on Ampere or newer.
* `cascade`: two such calls, a run's own keys and its prefix's, and no copies of a prefix (lensmith.model.cascade);
  taken instead where that is quicker by the lengths of the runs.
* `padded`: runs of similar length are stacked and go through scaled_dot_product_attention; any device, any precision.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lensmith.model.cascade import (
    AttendCascade,
    Cascade,
    build_cascade,
    cascade_backward,
    cascade_forward,
    fits_cascade,
    prefers_cascade,
)
from lensmith.model.flash import (
    Run,
    ToDevice,
    Varlen,
    build_varlen,
    flash_backward,
    flash_forward,
    key_rows,
    ungather,
    varlen_available,
)
from lensmith.types import Segment

BUCKET_GROWTH = 1.25
"""Runs share a padded bucket while the longest is at most this many times the shortest."""

SHORT_RUN = 64
"""On a CPU runs up to this long go through plain products: 5.2 ms instead of 12.0, forward and backward, for 142 runs of
19 queries and 28 keys (two cores; torch's flash kernel has blocks of 32 rows and more)."""


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
class Padded:
    """Layout for stacked runs."""

    buckets: tuple[Bucket, ...]
    order: Int[Tensor, " queries"] | None
    """Puts the buckets' queries back into pack order; None where they are in it."""


Layout = Varlen | Cascade | Padded
"""Which keys each query of a pack reads."""

Form = Literal["measured", "concatenated", "cascade"]
"""`measured`: by the lengths of the runs. The others ask for one form, `cascade` where the runs fit it at all."""


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
    runs: Sequence[Run],
    *,
    num_keys: int,
    causal: bool,
    device: torch.device,
    dtype: torch.dtype,
    form: Form = "measured",
) -> Layout:
    """Index tensors for `runs`, in query order, over a key tensor of `num_keys` rows; on `device`, for the form it uses.

    Without flash kernels `measured` and `concatenated` are the padded form.
    """
    tensor = lambda array: torch.from_numpy(array).to(device, non_blocking=True)  # noqa: E731
    has_flash = varlen_available(device, dtype)
    wants_two = form == "cascade" or (form == "measured" and has_flash and prefers_cascade(runs))
    if wants_two and fits_cascade(runs, causal=causal):
        return build_cascade(runs, num_keys, tensor)
    build = build_varlen if has_flash else _build_padded
    return build(runs, num_keys, causal, tensor)


def _build_padded(runs: Sequence[Run], num_keys: int, causal: bool, tensor: ToDevice) -> Padded:
    lengths, rows_read = np.array([run.length for run in runs]), key_rows(runs)
    starts = np.cumsum(lengths) - lengths
    members = _buckets(lengths, np.array([run.num_keys for run in runs]))
    rows = np.split(np.arange(lengths.sum()), starts[1:])
    order = np.concatenate([rows[i] for bucket in members for i in bucket])
    return Padded(
        buckets=tuple(
            _stack_bucket(lengths[bucket], starts[bucket], [rows_read[i] for i in bucket], causal, tensor)
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
    """Attention of every run over its own keys. Gradients reach query, key and value in all forms."""
    if isinstance(layout, Cascade):
        return AttendCascade.apply(query, key, value, layout, scale)  # type: ignore[return-value]
    attend_form = _attend_varlen if isinstance(layout, Varlen) else _attend_padded
    return attend_form(query, key, value, layout, scale)  # type: ignore[arg-type]


def _attend_varlen(query: Tensor, key: Tensor, value: Tensor, layout: Varlen, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if layout.gather is not None:
        key, value = key[layout.gather], value[layout.gather]
    call: Callable[..., Any] = varlen_attn  # its keywords differ between releases
    spans = layout.spans
    return call(
        query,
        key,
        value,
        spans.cu_queries,
        spans.cu_keys,
        spans.max_queries,
        spans.max_keys,
        scale=scale,
        window_size=(-1, 0) if spans.causal else (-1, -1),
        **_grouped_heads_flag(),
    )


@dataclass(slots=True)
class Attended:
    """What the backward pass of one `attend_by_hand` reads."""

    layout: Layout
    scale: float
    inputs: tuple[Tensor, Tensor, Tensor]
    """Query, key and value; of a Varlen layout as the kernel got them: gathered, where it gathers."""
    out: Tensor
    lse: Tensor | None = None
    random: tuple[Tensor, ...] = ()
    """What the flash kernels hand to their backward for dropout, of which there is none."""


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

    The padded form keeps a graph of its own from query, key and value to the output; the others need none.
    """
    if isinstance(layout, Varlen):
        return _flash_by_hand(query, key, value, layout, scale, keeps=keeps)
    if isinstance(layout, Cascade):
        out, lse, random = cascade_forward(query, key, value, layout, scale)
        return out, Attended(layout, scale, (query, key, value), out, lse, random) if keeps else None
    if not keeps:
        return attend(query, key, value, layout, scale), None
    with torch.enable_grad():
        inputs = (query.detach().requires_grad_(), key.detach().requires_grad_(), value.detach().requires_grad_())
        out = attend(*inputs, layout, scale)
    return out.detach(), Attended(layout, scale, inputs, out)


def attend_backward(grad: Float[Tensor, "queries heads width"], attended: Attended) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; once."""
    layout, lse = attended.layout, attended.lse
    if lse is None:
        return torch.autograd.grad(attended.out, attended.inputs, grad)  # type: ignore[return-value]
    kept = attended.inputs, attended.out, lse, attended.random
    if isinstance(layout, Cascade):
        return cascade_backward(grad, *kept, layout, attended.scale)
    assert isinstance(layout, Varlen), "the padded form keeps a graph, no log-sum-exps"
    grad_query, grad_key, grad_value = flash_backward(grad, *kept, layout.spans, attended.scale)
    if layout.gather is not None:
        grad_key, grad_value = ungather(grad_key, grad_value, layout)
    return grad_query, grad_key, grad_value


def _flash_by_hand(
    query: Tensor, key: Tensor, value: Tensor, layout: Varlen, scale: float, *, keeps: bool
) -> tuple[Tensor, Attended | None]:
    if layout.gather is not None:
        key, value = key.index_select(0, layout.gather), value.index_select(0, layout.gather)
    out, lse, random = flash_forward(query, key, value, layout.spans, scale)
    return out, Attended(layout, scale, (query, key, value), out, lse, random) if keeps else None


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
