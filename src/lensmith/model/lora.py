"""Adapted linears as one matrix product: W + scale * B A is formed once per call, not applied beside W to every token.

PEFT computes x W' + scale * (x A') B' per linear: two thin products, a scaling and a sum over every token. With T tokens
and rank r, forming W + scale * B A costs r / T of the product with W, so for packs it is next to nothing, and several
linears on one input become one product. The gradients are those of the sum: thin products only, never a full dW.

In fp32 and float64 only. In 16 bits W + scale * B A would round the adapter away; there PEFT's own layers run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn


def project(linears: Sequence[Any], x: Float[Tensor, "tokens inputs"]) -> tuple[Float[Tensor, "tokens outputs"], ...]:
    """`x` through each of several linears that read the same input, adapted or not."""
    merges = x.dtype in (torch.float32, torch.float64)
    parts = [part for linear in linears if merges and (part := _split(linear)) is not None]
    if len(parts) != len(linears):
        return tuple(linear(x) for linear in linears)
    tensors = [tensor for part in parts for tensor in (part.weight, part.down, part.up)]
    together = _MergedLinears.apply(x, tuple(part.scale for part in parts), *tensors)
    return together.split([len(part.weight) for part in parts], dim=-1)


@dataclass(frozen=True, slots=True)
class _Part:
    weight: Float[Tensor, "outputs inputs"]
    down: Float[Tensor, "rank inputs"] | None
    up: Float[Tensor, "outputs rank"] | None
    scale: float


def _split(linear: Any) -> _Part | None:
    """Base weight and adapter of a linear; None for what only its own forward knows (dropout, DoRA, 4 bits, biases)."""
    base, scale = linear, 1.0
    down: Any = None
    up: Any = None
    if isinstance(linear, LoraLinear):
        base = linear.base_layer
        if not (linear.disable_adapters or linear.merged):
            if len(linear.active_adapters) != 1:
                return None
            (name,) = linear.active_adapters
            if not isinstance(linear.lora_dropout[name], nn.Identity) or linear.use_dora.get(name):
                return None
            down, up, scale = linear.lora_A[name].weight, linear.lora_B[name].weight, linear.scaling[name]
    if type(base) is not nn.Linear or base.bias is not None or base.weight.requires_grad:
        return None
    return _Part(base.weight, down, up, scale)


class _MergedLinears(torch.autograd.Function):
    """Tensors come as weight, down, up of each linear; None for the last two where it has no adapter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: tuple[float, ...], *tensors: Tensor | None) -> Tensor:
        ctx.scales = scales
        ctx.save_for_backward(x, *tensors)
        return x @ _merge(scales, tensors).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TO,), (x_TI, *tensors) = grads, ctx.saved_tensors
        grad_x = grad_TO @ _merge(ctx.scales, tensors) if ctx.needs_input_grad[0] else None
        triples = list(zip(tensors[0::3], tensors[1::3], tensors[2::3], strict=True))
        slices = grad_TO.split([len(weight) for weight, _, _ in triples], dim=-1)
        found: list[Tensor | None] = []
        for scale, part_TO, (_, down_RI, up_OR) in zip(ctx.scales, slices, triples, strict=True):
            if down_RI is None:
                found += [None, None, None]
                continue
            # Thin products with the rank first: on a CPU [rank, T] x [T, outputs] takes an eighth of its transpose.
            thin_RT, back_RT = down_RI @ x_TI.T, up_OR.T @ part_TO.T
            found += [None, (back_RT @ x_TI).mul_(scale), (thin_RT @ part_TO).T.mul(scale)]
        return grad_x, None, *found


def _merge(scales: Sequence[float], tensors: Sequence[Any]) -> Float[Tensor, "outputs inputs"]:
    merged = [
        weight if down is None else torch.addmm(weight, up, down, alpha=scale)
        for scale, weight, down, up in zip(scales, tensors[0::3], tensors[1::3], tensors[2::3], strict=True)
    ]
    return merged[0] if len(merged) == 1 else torch.cat(merged)
