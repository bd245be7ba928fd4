"""Linears that read the same input, with their adapters, as one step of the graph.

PEFT computes x W' + scale * (x A') B' by separate modules per linear: a dozen kernels each, and an input kept for every
one of them. Two forms here compute the same:

* `merged`, in fp32 and float64: W + scale * B A is formed once per call and several linears become one product. With T
  tokens and rank r that costs r / T of the product. In 16 bits it would round the adapter away.
* `beside`, in 16 bits, and over 4-bit bases: x W' with B A' x' added in place. The dense form of a 4-bit weight lives in
  one buffer that the next linear overwrites, in the forward and again in the backward pass; x is kept once.

Both have the gradients of the sum: thin products only, never a full dW. DoRA, dropout and trained bases take PEFT's way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lensmith.model.quant import dense_weight, is_four_bit


def project(linears: Sequence[Any], x: Float[Tensor, "tokens inputs"]) -> tuple[Float[Tensor, "tokens outputs"], ...]:
    """`x` through each of several linears that read the same input, adapted or not."""
    parts = [part for linear in linears if (part := split_linear(linear)) is not None]
    if len(parts) != len(linears):
        return tuple(linear(x) for linear in linears)
    tensors = [tensor for part in parts for tensor in (part.down, part.up)]
    scales = tuple(part.scale for part in parts)
    if x.dtype in (torch.float32, torch.float64) and not any(is_four_bit(part.base) for part in parts):
        weights = tuple(part.base.weight for part in parts)
        together = _MergedLinears.apply(x, weights, scales, *tensors)
        return together.split([len(weight) for weight in weights], dim=-1)
    return _LinearsBeside.apply(x, tuple(part.base for part in parts), scales, *tensors)  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class Part:
    """A linear as found: frozen base and adapter."""

    linear: Any
    base: Any
    weight: Tensor
    """Of the base, in whatever form it is stored."""
    adapter: str | None = None
    """Name of the adapter that counts; None where there is none, or none in use."""
    down: Float[Tensor, "rank inputs"] | None = None
    up: Float[Tensor, "outputs rank"] | None = None
    scale: float = 1.0

    def is_current(self) -> bool:
        """Whether `split_linear` would find the same again. Asked for every linear in every pass, hence plain dictionaries."""
        linear, base = self.linear, self.base
        if base._parameters["weight"] is not self.weight or self.weight.requires_grad:
            return False
        if linear is base:
            return True
        if linear._disable_adapters or linear.merged_adapters:
            return self.adapter is None
        name, inside = self.adapter, linear._modules
        down, up = inside["lora_A"]._modules.get(name), inside["lora_B"]._modules.get(name)
        return (
            down is not None
            and up is not None
            and down._parameters["weight"] is self.down
            and up._parameters["weight"] is self.up
            and linear._active_adapter in (name, [name])
            and linear.scaling[name] == self.scale
        )


def split_linear(linear: Any) -> Part | None:
    """Frozen base and adapter of a linear; None for what only its own forward knows (dropout, DoRA, 8 bits, biases)."""
    base: Any = linear
    adapter: dict[str, Any] = {}
    if isinstance(linear, LoraLayer):
        base = linear.base_layer
        if not (linear.disable_adapters or linear.merged):
            if len(linear.active_adapters) != 1:
                return None
            (name,) = linear.active_adapters
            # An adapter that this linear does not have leaves it as it is, which is PEFT's to decide.
            if name not in linear.lora_A or linear.use_dora.get(name):
                return None
            if not isinstance(linear.lora_dropout[name], nn.Identity):
                return None
            down, up = linear.lora_A[name].weight, linear.lora_B[name].weight
            adapter = {"adapter": name, "down": down, "up": up, "scale": linear.scaling[name]}
    known = type(base) is nn.Linear or is_four_bit(base)
    if not known or base.bias is not None or base.weight.requires_grad:
        return None
    return Part(linear, base, base.weight, **adapter)


class Shadows:
    """All adapters of a model in the type that it computes in, made once per pass instead of at every use.

    2 bytes per adapter weight (0.08 GiB at 8B and rank 16) for fourteen small kernels per layer and run. Made new by each
    `refresh`, whoever moved the adapters and however.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        self._dtype = dtype
        self._sources: list[Tensor] = []
        self._copies: list[Tensor] = []

    def refresh(self) -> None:
        """Read the adapters as they are now."""
        # Plain dictionaries: parameters() walks every module, for 252 linears 7 ms.
        sources: list[Any] = [
            linear._parameters["weight"]
            for layer in self._layers
            for pair in (layer.lora_A, layer.lora_B)
            for linear in pair._modules.values()
        ]
        if not self._are_known(sources):
            # A shadow that stands in a stack stays there.
            self._sources, self._copies = sources, [self._shadow(source) for source in sources]
        with torch.no_grad():
            torch._foreach_copy_(self._copies, self._sources)  # pyright: ignore[reportPrivateImportUsage]

    def stack(self, downs: Sequence[Float[Tensor, "rank inputs"]]) -> Float[Tensor, "ranks inputs"]:
        """The shadows of several adapters' `down` below each other, so that one product serves linears with one input.

        The matrix is theirs from now on: each `refresh` fills it.
        """
        stacked = self._empty(downs[0], sum(map(len, downs)), downs[0].shape[1])
        for down, rows in zip(downs, stacked.split([len(down) for down in downs]), strict=True):
            rows.copy_(down.detach())
            down.shadow = rows  # pyright: ignore[reportAttributeAccessIssue]
        return stacked

    def _are_known(self, sources: list[Tensor]) -> bool:
        return len(sources) == len(self._copies) and all(
            getattr(source, "shadow", None) is copy for source, copy in zip(sources, self._copies, strict=True)
        )

    def _shadow(self, source: Tensor) -> Tensor:
        shadow = getattr(source, "shadow", None)
        if shadow is None or shadow.dtype is not self._dtype or shadow.device != source.device:
            shadow = self._empty(source, *source.shape)
            source.shadow = shadow  # pyright: ignore[reportAttributeAccessIssue]
        return shadow

    def _empty(self, source: Tensor, *shape: int) -> Tensor:
        # What an evaluation in inference mode makes could not be written to in training.
        with torch.inference_mode(mode=False):
            return torch.empty(shape, dtype=self._dtype, device=source.device)


def in_type(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """An adapter's weight in `dtype`: its shadow where there is one."""
    shadow = getattr(weight, "shadow", None)
    return shadow if shadow is not None and shadow.dtype is dtype else weight.to(dtype)


class _MergedLinears(torch.autograd.Function):
    """Tensors come as down, up of each linear; None where it has no adapter."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: tuple[Tensor, ...], scales: tuple[float, ...], *tensors: Tensor | None
    ) -> Tensor:
        ctx.weights, ctx.scales = weights, scales
        ctx.save_for_backward(x, *tensors)
        return x @ _merge(weights, scales, tensors).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TO,), (x_TI, *tensors) = grads, ctx.saved_tensors
        grad_x = grad_TO @ _merge(ctx.weights, ctx.scales, tensors) if ctx.needs_input_grad[0] else None
        slices = grad_TO.split([len(weight) for weight in ctx.weights], dim=-1)
        found: list[Tensor | None] = []
        for scale, part_TO, (down_RI, up_OR) in zip(ctx.scales, slices, _pairs(tensors), strict=True):
            if down_RI is None:
                found += [None, None]
                continue
            # Thin products with the rank first: on a CPU [rank, T] x [T, outputs] takes an eighth of its transpose.
            thin_RT, back_RT = down_RI @ x_TI.T, up_OR.T @ part_TO.T
            found += [(back_RT @ x_TI).mul_(scale), (thin_RT @ part_TO).T.mul(scale)]
        return grad_x, None, None, *found


def _merge(
    weights: Sequence[Tensor], scales: Sequence[float], tensors: Sequence[Any]
) -> Float[Tensor, "outputs inputs"]:
    merged = [
        weight if down is None else torch.addmm(weight, up, down, alpha=scale)
        for weight, scale, (down, up) in zip(weights, scales, _pairs(tensors), strict=True)
    ]
    return merged[0] if len(merged) == 1 else torch.cat(merged)


class _LinearsBeside(torch.autograd.Function):
    """Tensors come as down, up of each linear, in fp32; they are computed with in the type of x, as AdapterLinear does."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, bases: tuple[Any, ...], scales: tuple[float, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        outputs, thins = [], []
        for base, scale, (down_RI, up_OR) in zip(bases, scales, _pairs(tensors), strict=True):
            y_TO = x_TI @ dense_weight(base, x_TI.dtype).T
            if down_RI is not None:
                thin_TR = x_TI @ in_type(down_RI, x_TI.dtype).T
                y_TO.addmm_(thin_TR, in_type(up_OR, x_TI.dtype).T, alpha=scale)
                thins.append(thin_TR)
            outputs.append(y_TO)
        ctx.bases, ctx.scales, ctx.num_thins = bases, scales, len(thins)
        ctx.save_for_backward(x_TI, *thins, *tensors)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, *saved = ctx.saved_tensors
        thins, tensors = iter(saved[: ctx.num_thins]), saved[ctx.num_thins :]
        grad_x: Tensor | None = None
        found: list[Tensor | None] = []
        for base, scale, grad_TO, (down_RI, up_OR) in zip(ctx.bases, ctx.scales, grads, _pairs(tensors), strict=True):
            if ctx.needs_input_grad[0]:
                weight_OI = dense_weight(base, x_TI.dtype)
                grad_x = grad_TO @ weight_OI if grad_x is None else grad_x.addmm_(grad_TO, weight_OI)
            if down_RI is None:
                found += [None, None]
                continue
            back_TR = (grad_TO @ in_type(up_OR, x_TI.dtype)).mul_(scale)
            found += [
                (back_TR.T @ x_TI).to(down_RI.dtype),
                (grad_TO.T @ next(thins)).to(up_OR.dtype).mul_(scale),
            ]
            if grad_x is not None:
                grad_x.addmm_(back_TR, in_type(down_RI, x_TI.dtype))
        return grad_x, None, None, *found


def _pairs(tensors: Sequence[Any]) -> list[tuple[Any, Any]]:
    return list(zip(tensors[0::2], tensors[1::2], strict=True))
