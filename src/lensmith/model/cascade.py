"""Attention in two parts: each query reads its own segment, and those of all branches read the prefix they share.

Concatenated keys hold a prefix once for each of its branches, and flash kernels write their gradients once for each
query head. Here a prefix is read where it stands: its branches' queries, end to end, are one sequence over its keys. A
branch's two results are put together by their log-sum-exps.

Not by autograd: flash kernels drop the gradient of the log-sum-exp, so that losses would be right and gradients wrong.
Each part's backward kernel is given the *merged* result and log-sum-exp instead. It makes shares exp(score - lse) from
the one and sum(grad * out) from the other, which for merged ones are those of the whole softmax: what comes out is this
part's share of the true gradient, and nothing has to pass through the merge.

For one level of prefixes; deeper trees concatenate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from lensmith.model.flash import (
    Run,
    Spans,
    ToDevice,
    Varlen,
    build_varlen,
    flash_backward,
    flash_forward,
    make_spans,
    plain_backward,
    plain_forward,
    ungather,
    varlen_available,
)

COPIED_US, ASKED_US, FIXED_US = 0.0257, 0.089, 196.0
"""Forward and backward pass of one layer, 8B's heads, bf16, H100, torch 2.11: what concatenating costs for each row of
keys that it copies, and what two parts cost for each query that is in both, and at all. Least squares over 31 shapes
(benchmarks/attention_forms.py, attention-forms.json); of those none is in a form more than 4 % slower than the other."""

Rows = slice | Int[Tensor, " rows"]
"""Rows of a tensor: a slice where they are neighbours, which is read and added to without a copy."""


@dataclass(frozen=True, slots=True)
class Cascade:
    """Layout for two calls of the flash kernel."""

    own: Varlen
    """Every run over the keys of its own segment."""
    shared: Spans
    """One run per prefix: the queries of its branches over its keys."""
    asking: Rows
    """The queries of `shared`, in its order."""
    prefixes: Rows
    """The keys of `shared`, in its order; each row once."""


def fits_cascade(runs: Sequence[Run], *, causal: bool) -> bool:
    """Whether there are prefixes, and none of them has one itself."""
    levels = {len(run.keys) for run in runs}
    return causal and 2 in levels and max(levels) == 2


def prefers_cascade(runs: Sequence[Run]) -> bool:
    """Whether two parts take less time than concatenated keys, by the lengths of runs that fit."""
    copied, asking = count_shared(runs)
    return copied * COPIED_US > asking * ASKED_US + FIXED_US


def count_shared(runs: Sequence[Run]) -> tuple[int, int]:
    """Rows of prefixes that concatenating copies, once for each run that reads them, and the queries of those runs."""
    reading = [run for run in runs if len(run.keys) > 1]
    own = [stop - start for start, stop in (run.keys[-1] for run in reading)]
    return sum(run.num_keys for run in reading) - sum(own), sum(run.length for run in reading)


def build_cascade(runs: Sequence[Run], num_keys: int, tensor: ToDevice) -> Cascade:
    stops = np.cumsum([run.length for run in runs])
    readers: dict[tuple[int, int], list[Int[np.ndarray, " queries"]]] = {}
    for run, stop in zip(runs, stops, strict=True):
        for prefix in run.keys[:-1]:
            readers.setdefault(prefix, []).append(np.arange(stop - run.length, stop))
    asking = {prefix: np.concatenate(rows) for prefix, rows in readers.items()}
    lengths = [len(rows) for rows in asking.values()], [stop - start for start, stop in asking]
    shared = make_spans(*lengths, causal=False, tensor=tensor)
    # Told that no run is longer than one query, the kernel has a form of its own, with swapped heads and queries.
    # Otherwise the number only says how many programs to start.
    shared = replace(shared, max_queries=max(2, shared.max_queries))
    return Cascade(
        own=build_varlen([Run(run.length, run.keys[-1:]) for run in runs], num_keys, True, tensor),
        shared=shared,
        asking=_find_rows(list(asking.values()), tensor),
        prefixes=_find_rows([np.arange(*prefix) for prefix in asking], tensor),
    )


def _find_rows(pieces: Sequence[Int[np.ndarray, " rows"]], tensor: ToDevice) -> Rows:
    rows = np.concatenate(pieces)
    if (np.diff(rows) == 1).all():
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return tensor(rows)


def cascade_forward(
    query: Float[Tensor, "queries heads width"],
    key: Float[Tensor, "keys kv_heads width"],
    value: Float[Tensor, "keys kv_heads width"],
    layout: Cascade,
    scale: float,
) -> tuple[Float[Tensor, "queries heads width"], Float[Tensor, "heads queries"], tuple[Tensor, ...]]:
    """The merged result, its log-sum-exps, and what the kernels hand to their backward, first of the own part."""
    forward = flash_forward if varlen_available(query.device, query.dtype) else plain_forward
    out, lse, random = forward(query, *_own_keys(key, value, layout.own), layout.own.spans, scale)
    parts = _take(query, layout.asking), _take(key, layout.prefixes), _take(value, layout.prefixes)
    shared_out, shared_lse, shared_random = forward(*parts, layout.shared, scale)
    _merge(out, lse, shared_out, shared_lse, layout.asking)
    return out, lse, (*random, *shared_random)


def _merge(out: Tensor, lse: Tensor, shared_out: Tensor, shared_lse: Tensor, asking: Rows) -> None:
    """Into `out` and `lse`, at the rows that ask twice; in the log-sum-exps' precision, rounded once."""
    own_out, own_lse = _take(out, asking), _take(lse.T, asking).T
    both = torch.logaddexp(own_lse, shared_lse)
    share = (shared_lse - both).exp().T[..., None]
    # The shares of the two parts add up to one: own * (1 - share) + shared * share.
    merged = torch.lerp(own_out.to(both.dtype), shared_out.to(both.dtype), share)
    _put(out, asking, merged)
    _put(lse.T, asking, both.T)


def cascade_backward(
    grad: Float[Tensor, "queries heads width"],
    inputs: tuple[Tensor, Tensor, Tensor],
    out: Float[Tensor, "queries heads width"],
    lse: Float[Tensor, "heads queries"],
    random: tuple[Tensor, ...],
    layout: Cascade,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, which are the `inputs`; `out` and `lse` are the merged ones."""
    query, key, value = inputs
    backward = flash_backward if varlen_available(query.device, query.dtype) else plain_backward
    half = len(random) // 2
    # Gathered keys are gathered again: keeping them would cost each layer their memory.
    own = (query, *_own_keys(key, value, layout.own))
    grads = list(backward(grad, own, out, lse, random[:half], layout.own.spans, scale))
    if layout.own.gather is not None:
        grads[1:] = ungather(grads[1], grads[2], layout.own)
    del own
    asking, prefixes = layout.asking, layout.prefixes
    shared = backward(
        _take(grad, asking),
        (_take(query, asking), _take(key, prefixes), _take(value, prefixes)),
        _take(out, asking),
        _take(lse.T, asking).T.contiguous(),  # the kernel reads it by rows of heads
        random[half:],
        layout.shared,
        scale,
    )
    # No row comes twice: every sum has two terms and is rounded once, whatever the type.
    for whole, part, rows in zip(grads, shared, (asking, prefixes, prefixes), strict=True):
        _add(whole, rows, part)
    return grads[0], grads[1], grads[2]


def _own_keys(key: Tensor, value: Tensor, own: Varlen) -> tuple[Tensor, Tensor]:
    if own.gather is None:
        return key, value
    return key.index_select(0, own.gather), value.index_select(0, own.gather)


def _take(whole: Tensor, rows: Rows) -> Tensor:
    return whole[rows] if isinstance(rows, slice) else whole.index_select(0, rows)


def _put(whole: Tensor, rows: Rows, part: Tensor) -> None:
    if isinstance(rows, slice):
        whole[rows].copy_(part)
    else:
        whole.index_copy_(0, rows, part.to(whole.dtype))


def _add(whole: Tensor, rows: Rows, part: Tensor) -> None:
    if isinstance(rows, slice):
        whole[rows].add_(part)
    else:
        whole.index_add_(0, rows, part)


class AttendCascade(torch.autograd.Function):
    """Both parts as one step of autograd's graph: `apply(query, key, value, layout, scale)`."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Cascade, scale: float) -> Tensor:
        out, lse, random = cascade_forward(query, key, value, layout, scale)
        ctx.layout, ctx.scale = layout, scale
        ctx.save_for_backward(query, key, value, out, lse, *random)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  the decorator's type
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, *random = ctx.saved_tensors
        inputs = query, key, value
        return (*cascade_backward(grad, inputs, out, lse, tuple(random), ctx.layout, ctx.scale), None, None)
