"""Linears that read the same input, with their adapters, forward and backward by hand: nothing here is recorded.

The numbers are those of `lora.project` in its form `beside`: x W' with B A' x' added in place, thin products only in the
gradients. The adapters' `down` matrices of the linears stand below each other, so that query, key and value (or gate and
up) cost one thin product of x instead of three, in each direction.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lensmith.model.lora import Part, Shadows, in_type
from lensmith.model.quant import dense_weight, is_four_bit


class Linears:
    """`parts` read the same input. `shadows` as in the engine: None where adapters are in the model's own type."""

    def __init__(self, parts: Sequence[Part], shadows: Shadows | None) -> None:
        self.parts = tuple(parts)
        self._four_bit = tuple(is_four_bit(part.base) for part in parts)
        adapted = [part for part in parts if part.down is not None]
        self._downs = [part.down for part in adapted if part.down is not None]
        self._stacked = shadows.stack(self._downs) if shadows is not None and adapted else None
        self._rows = None if self._stacked is None else self._downs[0].shadow  # type: ignore[attr-defined]
        self._ranks = [len(down) for down in self._downs]
        starts = iter([sum(self._ranks[:n]) for n in range(len(adapted))])
        self._columns = tuple(
            None if part.down is None else slice(start := next(starts), start + len(part.down)) for part in parts
        )
        """Where in the stack each linear's adapter stands; None where it has none."""
        self.tensors = tuple(tensor for part in adapted for tensor in (part.down, part.up))
        self.up_scales = tuple(part.scale for part in adapted)

    def is_current(self) -> bool:
        """Whether the linears and their adapters are still those that were found, and the stack theirs."""
        if self._rows is not None and self._downs[0].shadow is not self._rows:  # type: ignore[attr-defined]
            return False
        return all(part.is_current() for part in self.parts)

    def forward(
        self, x: Float[Tensor, "tokens inputs"], onto: Tensor | None = None
    ) -> tuple[list[Float[Tensor, "tokens outputs"]], Float[Tensor, "tokens ranks"] | None]:
        """Outputs, and x A' for the backward pass. `onto` is what a lone linear's output is added to."""
        thin = x @ self._down(x.dtype).T if self._downs else None
        outputs = []
        for number, (part, columns) in enumerate(zip(self.parts, self._columns, strict=True)):
            weight = self._dense(number, x.dtype).T
            y = x @ weight if onto is None or columns is not None else torch.addmm(onto, x, weight)
            if columns is not None and thin is not None and part.up is not None:
                y.addmm_(thin[:, columns], in_type(part.up, x.dtype).T, alpha=part.scale)
                if onto is not None:
                    # Last, so that only one rounding is of the size of the residual, which is far larger than y.
                    y.add_(onto)
            outputs.append(y)
        return outputs, thin

    def thin(self, x: Float[Tensor, "tokens inputs"]) -> Float[Tensor, "tokens ranks"] | None:
        """What `forward` returns for the backward pass, without the outputs."""
        return x @ self._down(x.dtype).T if self._downs else None

    def adapter_gradients(
        self, grads: Sequence[Tensor], x: Float[Tensor, "tokens inputs"], thin: Float[Tensor, "tokens ranks"] | None
    ) -> tuple[Float[Tensor, "tokens ranks"] | None, list[Tensor]]:
        """Gradients before A (scaled), for `input_gradient`; and those of `tensors`, the ups still to be scaled."""
        if thin is None:
            return None, []
        back, ups = torch.empty_like(thin), []
        for grad, part, columns in zip(grads, self.parts, self._columns, strict=True):
            if columns is None or part.up is None:
                continue
            # With beta 0 what stands in `back` is not read.
            back[:, columns].addmm_(grad, in_type(part.up, grad.dtype), beta=0, alpha=part.scale)
            ups.append(_product_of_rows(grad, thin[:, columns], part.up.dtype))
        downs = _product(back.T, x, self._downs[0].dtype).split(self._ranks)
        return back, [tensor for pair in zip(downs, ups, strict=True) for tensor in pair]

    def input_gradient(
        self, grads: Sequence[Tensor], back: Float[Tensor, "tokens ranks"] | None
    ) -> Float[Tensor, "tokens inputs"]:
        """Gradient of what the linears read; `back` from `adapter_gradients`."""
        found = grads[0] @ self._dense(0, grads[0].dtype)
        for number, grad in enumerate(grads[1:], start=1):
            found.addmm_(grad, self._dense(number, grad.dtype))
        return found if back is None else found.addmm_(back, self._down(back.dtype))

    def _dense(self, number: int, dtype: torch.dtype) -> Float[Tensor, "outputs inputs"]:
        part = self.parts[number]
        return dense_weight(part.base, dtype) if self._four_bit[number] else part.weight

    def _down(self, dtype: torch.dtype) -> Float[Tensor, "ranks inputs"]:
        if self._stacked is not None and self._stacked.dtype is dtype:
            return self._stacked
        return (self._downs[0] if len(self._downs) == 1 else torch.cat(self._downs)).to(dtype)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in `dtype`. From 16 bits to fp32 a GPU does it at once: no rounding, no kernel for the cast."""
    if left.dtype is dtype:
        return left @ right
    if left.is_cuda and dtype is torch.float32:
        return torch.mm(left, right, out_dtype=dtype)  # pyright: ignore[reportCallIssue]
    return (left @ right).to(dtype)


def _product_of_rows(
    left: Float[Tensor, "tokens outputs"], right: Float[Tensor, "tokens rank"], dtype: torch.dtype
) -> Float[Tensor, "outputs rank"]:
    if left.is_cuda:
        return _product(left.T, right, dtype)
    # Rank first: on a CPU [rank, T] x [T, outputs] takes an eighth of its transpose.
    return _product(right.T, left, dtype).T
