"""The language head on labelled rows only: no [tokens, vocabulary] tensor is ever made.

Log-probabilities come in chunks of rows; the backward pass makes each chunk's logits again instead of keeping them. With
a vocabulary of 151,936 one row of fp32 logits is 0.6 MB, so a pack of 6,000 tokens would need 3.6 GB for the whole.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_BYTES = 128 * 2**20
"""Largest fp32 logits tensor alive at one time; at 151,936 words that is 220 rows."""


def token_logprobs(
    hidden: Float[Tensor, "rows width"],
    head: Float[Tensor, "vocab width"],
    targets: Int[Tensor, " rows"],
    *,
    chunk_rows: int | None = None,
) -> Float[Tensor, " rows"]:
    """log softmax(hidden @ head.T)[target] per row, in fp32 (float64 for float64 inputs); gradients for hidden and head."""
    if chunk_rows is None:
        chunk_rows = max(1, CHUNK_BYTES // (4 * head.shape[0]))
    return _ChunkedLogprobs.apply(hidden, head, targets, chunk_rows)  # type: ignore[return-value]


def _logits(hidden_RD: Tensor, head_VD: Tensor) -> Tensor:
    # At least fp32: the softmax sums over the whole vocabulary.
    logits_RV = hidden_RD @ head_VD.T
    return logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, chunk_rows: int) -> Tensor:
        logprobs, lse = [], []
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits_RV = _logits(hidden[rows], head)
            lse.append(logits_RV.logsumexp(-1))
            logprobs.append(logits_RV.gather(1, targets[rows, None])[:, 0] - lse[-1])
        empty = hidden.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32))
        ctx.save_for_backward(hidden, head, targets, torch.cat(lse) if lse else empty)
        ctx.chunk_rows = chunk_rows
        return torch.cat(logprobs) if logprobs else empty

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        hidden, head, targets, lse = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(head, dtype=lse.dtype) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), ctx.chunk_rows):
            rows = slice(start, start + ctx.chunk_rows)
            # d logprob / d logits = onehot(target) - softmax
            delta_RV = (_logits(hidden[rows], head) - lse[rows, None]).exp_().neg_()
            delta_RV.scatter_add_(1, targets[rows, None], torch.ones_like(delta_RV[:, :1]))
            delta_RV = delta_RV.mul_(grad[rows, None]).to(head.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = delta_RV @ head
            if grad_head is not None:
                grad_head += delta_RV.T @ hidden[rows]
        return grad_hidden, None if grad_head is None else grad_head.to(head.dtype), None, None
