"""The language head on labelled rows only: no [tokens, vocabulary] tensor is ever made.

The vocabulary is walked in pieces. A frozen head is read once per step, like the keys and values of flash attention:

    logprob  = logit[target] - log sum_v exp(logit_v)
    gradient = sum_{v != target} p_v (W_target - W_v)                       of the logprob, for the hidden row

so each piece adds to the sum of exponentials and, weighted by them, to the sum of head rows; both are rescaled when a
larger logit turns up (arXiv:1805.02867). The backward pass is then one multiplication, and a head that lives in host
memory or in few bits crosses the bus, or is widened, once. A head that trains reads its pieces again for its own gradient.

The target stands apart: near certainty its weight and the sum almost cancel, and what is left would be rounding error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

PIECE_BYTES = 128 * 2**20
"""Largest logits tensor alive at one time, in fp32: all words for 220 rows at once, a twentieth of them for 4,400."""
FEWEST_WORDS = 1024
"""Narrower pieces make slow products; so do pieces of an odd number of words, whose rows of logits start between the 16
bytes that a GPU loads at once: 36 ms of products instead of 6 for 1,600 rows at 8B (docs/log.md 2026-11-25)."""


def whole_pieces(words: int) -> int:
    """At most so many words as a multiple of FEWEST_WORDS, and that at least."""
    return max(FEWEST_WORDS, words // FEWEST_WORDS * FEWEST_WORDS)


class HeadWeight(Protocol):
    """A head that gives its weight piece by piece, wherever and however it is stored."""

    @property
    def num_words(self) -> int: ...

    def pieces(self, words: int) -> Iterator[tuple[int, Float[Tensor, "words width"]]]:
        """First word and weight of consecutive pieces of at most `words` words, on the device that computes."""
        ...


class WholeHead:
    """A head whose weight lies on the device."""

    def __init__(self, weight: Float[Tensor, "vocab width"]) -> None:
        self.weight = weight

    @property
    def num_words(self) -> int:
        return len(self.weight)

    def pieces(self, words: int) -> Iterator[tuple[int, Float[Tensor, "words width"]]]:
        for start in range(0, len(self.weight), words):
            yield start, self.weight[start : start + words]


def token_logprobs(
    hidden: Float[Tensor, "rows width"],
    head: Float[Tensor, "vocab width"] | HeadWeight,
    targets: Int[Tensor, " rows"],
    *,
    piece_words: int | None = None,
) -> Float[Tensor, " rows"]:
    """log softmax(hidden @ head.T)[target] per row, in fp32 (float64 for float64 inputs); gradients for hidden and head.

    A `HeadWeight` is frozen; a tensor gets a gradient if it wants one.
    """
    trained, source, words = _prepare(hidden, head, piece_words)
    return _Logprobs.apply(hidden, trained, source, targets, words, False)[0]  # type: ignore[index]


def token_logprobs_and_entropies(
    hidden: Float[Tensor, "rows width"], head: Float[Tensor, "vocab width"] | HeadWeight, targets: Int[Tensor, " rows"]
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """As `token_logprobs`, with the entropy of each row's distribution in nats; the entropies carry no gradient."""
    trained, source, words = _prepare(hidden, head, None)
    return _Logprobs.apply(hidden, trained, source, targets, words, True)  # type: ignore[return-value]


def _prepare(hidden: Tensor, head: Any, piece_words: int | None) -> tuple[Tensor | None, HeadWeight, int]:
    """The head where it wants a gradient, the head to walk, and how many of its words at a time."""
    trained = head if isinstance(head, Tensor) and head.requires_grad else None
    source = WholeHead(head.detach()) if isinstance(head, Tensor) else head
    return trained, source, piece_words or whole_pieces(PIECE_BYTES // (4 * max(1, len(hidden))))


def _logits(hidden_RD: Tensor, piece_VD: Tensor) -> Tensor:
    # At least fp32: the softmax sums over the whole vocabulary.
    logits_RV = hidden_RD @ piece_VD.T
    return logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        trained: Tensor | None,
        source: HeadWeight,
        targets: Tensor,
        words: int,
        wants_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        wants_direction = ctx.needs_input_grad[0] and trained is None
        walk = _Walk(hidden, targets, wants_direction=wants_direction, wants_entropy=wants_entropy)
        for start, piece in source.pieces(words):
            walk.visit(start, piece)
        lse = walk.lse()
        ctx.source, ctx.words = source, words
        ctx.save_for_backward(walk.direction(), *((hidden, targets, lse) if trained is not None else ()))
        entropy = walk.entropy()
        ctx.mark_non_differentiable(entropy)
        return walk.chosen - lse, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_R, (direction_RD, *kept) = grads[0], ctx.saved_tensors
        if not kept:
            return (direction_RD * grad_R[:, None]).to(direction_RD.dtype), None, None, None, None, None
        hidden_RD, targets, lse_R = kept
        grad_hidden = torch.zeros_like(hidden_RD, dtype=lse_R.dtype)
        grad_head = hidden_RD.new_empty(ctx.source.num_words, hidden_RD.shape[1])
        for start, piece_VD in ctx.source.pieces(ctx.words):
            # d logprob / d logits = onehot(target) - softmax
            delta_RV = (_logits(hidden_RD, piece_VD) - lse_R[:, None]).exp_().neg_()
            here, local = _inside(targets, start, len(piece_VD))
            delta_RV.scatter_add_(1, local[:, None], here[:, None].to(delta_RV.dtype))
            delta_RV = delta_RV.mul_(grad_R[:, None]).to(piece_VD.dtype)
            grad_hidden += delta_RV @ piece_VD
            torch.mm(delta_RV.T, hidden_RD, out=grad_head[start : start + len(piece_VD)])
        return grad_hidden.to(hidden_RD.dtype), grad_head, None, None, None, None


class _Walk:
    """What is known after some pieces of the vocabulary; one entry per row."""

    def __init__(
        self,
        hidden: Float[Tensor, "rows width"],
        targets: Tensor,
        *,
        wants_direction: bool,
        wants_entropy: bool = False,
    ) -> None:
        self.hidden, self.targets = hidden, targets
        wide = torch.promote_types(hidden.dtype, torch.float32)
        self.largest = hidden.new_full((len(hidden),), -torch.inf, dtype=wide)
        self.rest = hidden.new_zeros(len(hidden), dtype=wide)
        """Sum of exp(logit - largest) over all words but the target."""
        self.chosen = hidden.new_zeros(len(hidden), dtype=wide)
        """Logit of the target."""
        self.others = torch.zeros_like(hidden, dtype=wide) if wants_direction else None
        """The same sum, of each word's exponential times the head's row."""
        self.mass = torch.zeros_like(self.rest)
        """Sum of exp(x) over all words, x = logit - largest, where the entropy is wanted."""
        self.moment = torch.zeros_like(self.rest) if wants_entropy else None
        """Sum of exp(x) * x."""
        self.own = torch.zeros_like(hidden) if wants_direction else None
        """The head's row of the target."""

    def visit(self, start: int, piece: Float[Tensor, "words width"]) -> None:
        weights_RV = _logits(self.hidden, piece)
        here, local = _inside(self.targets, start, len(piece))
        self.chosen = torch.where(here, weights_RV.gather(1, local[:, None])[:, 0], self.chosen)
        largest = torch.maximum(self.largest, weights_RV.amax(1))
        shrink = (self.largest - largest).exp()
        weights_RV.sub_(largest[:, None]).exp_()
        if self.moment is not None:
            # With a larger logit every x falls by the same: sum e^(x - d) (x - d) = e^-d (moment - d mass).
            fall = (largest - self.largest).nan_to_num_(posinf=0.0)
            self.moment = (self.moment - fall * self.mass) * shrink - torch.special.entr(weights_RV).sum(1)
            self.mass = self.mass * shrink + weights_RV.sum(1)
        weights_RV.scatter_(1, local[:, None], weights_RV.gather(1, local[:, None]).masked_fill_(here[:, None], 0))
        self.rest, self.largest = self.rest * shrink + weights_RV.sum(1), largest
        if self.others is not None and self.own is not None:
            self.others.mul_(shrink[:, None]).add_(weights_RV.to(piece.dtype) @ piece)
            self.own = torch.where(here[:, None], piece[local], self.own)

    def _total(self) -> Float[Tensor, " rows"]:
        return self.rest + (self.chosen - self.largest).exp()

    def lse(self) -> Float[Tensor, " rows"]:
        return self.largest + self._total().log()

    def entropy(self) -> Float[Tensor, " rows"]:
        """-sum p log p per row in nats; empty where nobody asked."""
        if self.moment is None:
            return self.hidden.new_empty(0)
        return self.mass.log() - self.moment / self.mass

    def direction(self) -> Float[Tensor, "rows width"]:
        """Gradient of each log-probability for its hidden row; empty where nobody asked."""
        if self.others is None or self.own is None:
            return self.hidden.new_empty(0)
        return ((self.rest[:, None] * self.own - self.others) / self._total()[:, None]).to(self.hidden.dtype)


def _inside(targets: Tensor, start: int, words: int) -> tuple[Tensor, Tensor]:
    """Whether each target is one of the piece's words, and a valid place in the piece for it in any case."""
    local = targets - start
    return (local >= 0) & (local < words), local.clamp(0, words - 1)
