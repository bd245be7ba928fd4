"""Torch's variable-length flash kernel: what it is given, what it gives back, and the same in plain products.

A call reads queries and keys that are cut into runs, run by run. It is made as torch's varlen_attn makes it, without
the layers of Python around that, and with the log-sum-exps, which attention in two parts needs
(lensmith.model.cascade). The plain form is for devices and types that the kernel does not know, float64 on a CPU above
all: not for speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lensmith.model.quant import has_triton

ToDevice = Callable[[np.ndarray], Tensor]


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
class Spans:
    """Where runs end in queries and in keys that stand in the order of the runs."""

    causal: bool
    """From the lower right corner: the last query of a run sees all its keys."""
    cu_queries: Int[Tensor, " runs_and_one"]
    cu_keys: Int[Tensor, " runs_and_one"]
    max_queries: int
    max_keys: int


@dataclass(frozen=True, slots=True)
class Varlen:
    """Layout for one call of the flash kernel, as index tensors on its device."""

    spans: Spans
    gather: Int[Tensor, " keys"] | None
    """Rows of the key tensor in the order of the runs; None where that is the tensor as it stands."""
    readers: tuple[Int[Tensor, " keys"], Int[Tensor, " rows_and_one"]] | None
    """The way back of `gather`, None with it: its places sorted by the row that they read, and where each row's start."""


def make_spans(queries: Sequence[int], keys: Sequence[int], *, causal: bool, tensor: ToDevice) -> Spans:
    """From the lengths of each run."""
    cu_queries, cu_keys = (tensor(np.cumsum([0, *lengths], dtype=np.int32)) for lengths in (queries, keys))
    return Spans(causal, cu_queries, cu_keys, max(queries), max(keys))


def key_rows(runs: Sequence[Run]) -> list[Int[np.ndarray, " keys"]]:
    return [np.concatenate([np.arange(*span) for span in run.keys]) for run in runs]


def build_varlen(runs: Sequence[Run], num_keys: int, causal: bool, tensor: ToDevice) -> Varlen:
    gather = np.concatenate(key_rows(runs))
    in_order = len(gather) == num_keys and bool((np.diff(gather) == 1).all())
    spans = make_spans([run.length for run in runs], [run.num_keys for run in runs], causal=causal, tensor=tensor)
    if in_order:
        return Varlen(spans, None, None)
    order = np.argsort(gather, kind="stable").astype(np.int32)
    starts = np.searchsorted(gather[order], np.arange(num_keys + 1)).astype(np.int32)
    return Varlen(spans, tensor(gather), (tensor(order), tensor(starts)))


@cache
def varlen_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's variable-length flash kernel runs here: 16-bit types on compute capability 8.0 or newer."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def flash_forward(
    query: Float[Tensor, "queries heads width"],
    key: Float[Tensor, "keys kv_heads width"],
    value: Float[Tensor, "keys kv_heads width"],
    spans: Spans,
    scale: float,
) -> tuple[Float[Tensor, "queries heads width"], Float[Tensor, "heads queries"], tuple[Tensor, ...]]:
    """Result, log-sum-exps in fp32, and what the kernel hands to its backward for dropout, of which there is none."""
    out, lse, *random = torch.ops.aten._flash_attention_forward(
        query, key, value, *_lengths(spans), 0.0, spans.causal, False, scale=scale, **_window(spans)
    )[:4]
    return out, lse, tuple(random)


def flash_backward(
    grad: Float[Tensor, "queries heads width"],
    inputs: tuple[Tensor, Tensor, Tensor],
    out: Float[Tensor, "queries heads width"],
    lse: Float[Tensor, "heads queries"],
    random: tuple[Tensor, ...],
    spans: Spans,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, which are the `inputs`."""
    return torch.ops.aten._flash_attention_backward(
        grad, *inputs, out, lse, *_lengths(spans), 0.0, spans.causal, *random, scale=scale, **_window(spans)
    )


def _lengths(spans: Spans) -> tuple[Tensor, Tensor, int, int]:
    return spans.cu_queries, spans.cu_keys, spans.max_queries, spans.max_keys


def _window(spans: Spans) -> dict[str, int]:
    return {"window_size_left": -1, "window_size_right": 0 if spans.causal else -1}


def plain_forward(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """As `flash_forward`, in fp32 or wider between input and result."""
    outs, lses = [], []
    for _, _, scores, _, values in _each_run(query, key, value, spans, scale):
        outs.append(torch.einsum("hqk,khw->qhw", scores.softmax(-1), values))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs).to(query.dtype), torch.cat(lses, 1), ()


def plain_backward(
    grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    random: tuple[Tensor, ...],
    spans: Spans,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `flash_backward`, without a graph: FlashAttention's own way back (arXiv:2205.14135, algorithm 4)."""
    query, key, value = inputs
    grad, out = grad.to(lse.dtype), out.to(lse.dtype)
    grads = [torch.zeros_like(part, dtype=lse.dtype) for part in inputs]
    groups = (key.shape[1], -1)
    for q, k, scores, keys, values in _each_run(query, key, value, spans, scale):
        share = (scores - lse[:, q, None]).exp()
        grad_share = torch.einsum("qhw,khw->hqk", grad[q], values) - (grad[q] * out[q]).sum(-1).T[..., None]
        grad_scores = share * grad_share * scale
        grads[0][q] = torch.einsum("hqk,khw->qhw", grad_scores, keys)
        grads[1][k] = torch.einsum("hqk,qhw->khw", grad_scores, query[q].to(lse.dtype)).unflatten(1, groups).sum(2)
        grads[2][k] = torch.einsum("hqk,qhw->khw", share, grad[q]).unflatten(1, groups).sum(2)
    return grads[0].to(query.dtype), grads[1].to(key.dtype), grads[2].to(value.dtype)


def _each_run(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor]]:
    """Of each run its queries and keys, and for every query head the scores, keys and values."""
    group, wide = query.shape[1] // key.shape[1], torch.promote_types(query.dtype, torch.float32)
    ends = [(cu[:-1].tolist(), cu[1:].tolist()) for cu in (spans.cu_queries, spans.cu_keys)]
    for q, k in zip(*(map(slice, *pair) for pair in ends), strict=True):
        keys, values = (part[k].to(wide).repeat_interleave(group, 1) for part in (key, value))
        scores = torch.einsum("qhw,khw->hqk", query[q].to(wide), keys) * scale
        if spans.causal:
            rows, columns = scores.shape[1:]
            seen = torch.ones(rows, columns, dtype=torch.bool, device=scores.device).tril(columns - rows)
            scores = scores.masked_fill(~seen, -torch.inf)
        yield q, k, scores, keys, values


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
