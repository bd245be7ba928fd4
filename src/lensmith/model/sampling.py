"""Drawing the next token: temperature, top-k, top-p and min-p as transformers applies them, and tokens never drawn.

The log-probability that comes with a token is that of the distribution at `temperature` over all words, before anything is
filtered: it is what training computes for the same token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn. None: no such filter."""

    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None

    def filters(self) -> LogitsProcessorList:
        """transformers' own, in the order in which its `generate` applies them."""
        filters = LogitsProcessorList()
        if self.top_k is not None:
            filters.append(TopKLogitsWarper(top_k=self.top_k))
        if self.top_p is not None and self.top_p < 1.0:
            filters.append(TopPLogitsWarper(top_p=self.top_p))
        if self.min_p is not None:
            filters.append(MinPLogitsWarper(min_p=self.min_p))
        return filters


class Sampler:
    """Draws tokens without waiting for the device, so that a CUDA graph can hold it."""

    def __init__(self, sampling: Sampling, never: Int[Tensor, " words"]) -> None:
        """`never`: ids that are not drawn, on the device of the logits."""
        self._sampling, self._filters, self._never = sampling, sampling.filters(), never

    @property
    def greedy(self) -> bool:
        return self._sampling.temperature == 0

    def draw(
        self, logits: Float[Tensor, "sequences vocab"], noise: Float[Tensor, "sequences vocab"]
    ) -> tuple[Int[Tensor, " sequences"], Float[Tensor, " sequences"]]:
        """Tokens and their log-probabilities. `noise`: drawn from the exponential distribution; greedy drawing ignores it.

        The word with the largest p / noise is a draw from p (exponential races; torch.multinomial does the same).
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if not self.greedy and self._sampling.temperature != 1.0:
            logits = logits / self._sampling.temperature
        allowed = logits.index_fill(1, self._never, -torch.inf)
        # The filters look at scores only; transformers' signature wants the ids before them too.
        race = allowed if self.greedy else self._filters(None, allowed).softmax(-1).div_(noise)  # type: ignore[arg-type]
        tokens = race.argmax(-1)
        chosen = logits.gather(1, tokens[:, None])[:, 0]
        return tokens, chosen - logits.logsumexp(-1)
