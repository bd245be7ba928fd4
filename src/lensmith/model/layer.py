"""One decoder layer as one step of autograd's graph, its backward pass written by hand.

Steps recorded one by one cost more Python than a short pack costs the GPU: a dozen autograd functions, some of them in
modules within modules, 2.7 ms per layer, run and direction (docs/log.md 2026-11-24). Here a layer is a row of products and
kernels with nothing in between; what belongs to the layer (weights, adapters, their order) is looked up once and kept for as
long as it stays so.

What it computes is what `engine.run_layer` computes, and it keeps no more. Two things are left out: a layer that runs again
in the backward pass stops before its last product, whose result nobody asks for; and linears with one input share their thin
products. Fused are layers whose own weights are frozen, 16 bits or wider or in bitsandbytes' 4, with plain
LoRA on any of their linears or on none (`fuse`). All others, and the last layer with its selected rows, go step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lensmith.model.attention import Attended, Layout, attend_backward, attend_by_hand
from lensmith.model.kernels import (
    norm_rotate_backward,
    norm_rotate_forward,
    rms_backward,
    rms_forward,
    swiglu_backward,
    swiglu_forward,
)
from lensmith.model.linears import Linears
from lensmith.model.lora import Part, Shadows, split_linear
from lensmith.model.recompute import Waiting

Rope = tuple[Float[Tensor, "tokens width"], Float[Tensor, "tokens width"]]
Visit = Callable[[Literal["forward", "backward"]], None]
"""Brings the layer's weights to the device, before each of its two runs."""

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@dataclass(slots=True)
class Kept:
    """What a layer's backward pass reads. Each part is given up as soon as it has been read."""

    hidden: Any = None
    hidden_scale: Any = None
    normed: Any = None
    thin_normed: Any = None
    query: Any = None
    key: Any = None
    head_scales: Any = None
    """Of the norms of queries and keys."""
    attended: Attended | None = None
    mixed: Any = None
    thin_mixed: Any = None
    middle: Any = None
    """Hidden states between attention and MLP."""
    middle_scale: Any = None
    normed_middle: Any = None
    thin_middle: Any = None
    gate: Any = None
    up: Any = None
    inner: Any = None
    thin_inner: Any = None

    def take(self, name: str) -> Any:
        """A part, not kept any longer."""
        found = getattr(self, name)
        setattr(self, name, None)
        return found


class FusedLayers:
    """The fused form of each decoder layer, made at its first use and again whenever adapters have changed."""

    def __init__(self) -> None:
        self._made: dict[int, FusedLayer] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the model has layers of its own to look at.
        return FusedLayers, ()

    def find(self, index: int, layer: Any, shadows: Shadows | None) -> FusedLayer | None:
        """The layer's fused form; None where it has to go step by step."""
        made = self._made.get(index)
        if made is not None and made.is_current(layer, shadows):
            return made
        made = fuse(layer, shadows)
        if made is None:
            self._made.pop(index, None)
        else:
            self._made[index] = made
        return made


def fuse(layer: Any, shadows: Shadows | None) -> FusedLayer | None:
    """The layer as one step; None where a norm or a linear trains, or one is not plain (dropout, DoRA, biases, 8 bits)."""
    norms = [layer.input_layernorm, layer.self_attn.q_norm, layer.self_attn.k_norm, layer.post_attention_layernorm]
    if any(norm.weight.requires_grad for norm in norms):
        return None
    parts: list[Part] = []
    for owner, names in ((layer.self_attn, ATTENTION), (layer.mlp, MLP)):
        for name in names:
            part = split_linear(getattr(owner, name))
            if part is None:
                return None
            parts.append(part)
    return FusedLayer(layer, norms, parts, shadows)


class FusedLayer:
    """A decoder layer that fits; made by `fuse`."""

    def __init__(self, layer: Any, norms: Sequence[Any], parts: Sequence[Part], shadows: Shadows | None) -> None:
        self._layer, self._shadows = layer, shadows
        self._norms = tuple(norms)
        self._weights = tuple((norm.weight, norm.variance_epsilon) for norm in norms)
        self._scale, self._head_dim = layer.self_attn.scaling, layer.self_attn.head_dim
        self._qkv, self._out = Linears(parts[:3], shadows), Linears(parts[3:4], shadows)
        self._gate_up, self._down = Linears(parts[4:6], shadows), Linears(parts[6:], shadows)
        self._groups = (self._qkv, self._out, self._gate_up, self._down)
        self._linears = tuple(part.linear for part in parts)
        self.tensors = tuple(tensor for group in self._groups for tensor in group.tensors)
        """Adapters in use: down and up of each linear, in the order of ATTENTION and MLP."""
        self._up_scales = tuple(scale for group in self._groups for scale in group.up_scales)

    def is_current(self, layer: Any, shadows: Shadows | None) -> bool:
        """Whether `fuse` would make the same again. Costs microseconds: it is asked once per layer and pass."""
        if layer is not self._layer or shadows is not self._shadows:
            return False
        attention, mlp = layer._modules["self_attn"]._modules, layer._modules["mlp"]._modules
        found = (*(attention[name] for name in ATTENTION), *(mlp[name] for name in MLP))
        if any(here is not there for here, there in zip(found, self._linears, strict=True)):
            return False
        for norm, (weight, _) in zip(self._norms, self._weights, strict=True):
            if norm._parameters["weight"] is not weight or weight.requires_grad:
                return False
        return all(group.is_current() for group in self._groups)

    def run(
        self,
        hidden: Float[Tensor, "tokens width"],
        rope: Rope,
        layout: Layout,
        waiting: Waiting | None = None,
        visit: Visit | None = None,
    ) -> Float[Tensor, "tokens width"]:
        """Hidden states behind the layer. With `waiting` only its input is kept and it runs again in the backward pass."""
        records = torch.is_grad_enabled()
        return _Layer.apply(hidden, self, rope, layout, waiting, visit, records, *self.tensors)  # type: ignore[return-value]

    def forward(
        self, hidden: Float[Tensor, "tokens width"], rope: Rope, layout: Layout, kept: Kept | None
    ) -> Float[Tensor, "tokens width"]:
        """The layer, outside of any graph; what its backward pass reads goes into `kept`."""
        middle = self._attention(hidden, rope, layout, kept)
        inner = self._inner(middle, kept)
        (out,), thin = self._down.forward(inner, onto=middle)
        if kept is not None:
            kept.inner, kept.thin_inner = inner, thin
        return out

    def again(self, hidden: Float[Tensor, "tokens width"], rope: Rope, layout: Layout) -> Kept:
        """The second run: all that the backward pass reads, and no output."""
        kept = Kept()
        kept.inner = self._inner(self._attention(hidden, rope, layout, kept), kept)
        kept.thin_inner = self._down.thin(kept.inner)
        return kept

    def _attention(self, hidden: Tensor, rope: Rope, layout: Layout, kept: Kept | None) -> Tensor:
        norm, query_norm, key_norm, _ = self._weights
        normed, hidden_scale = rms_forward(hidden, *norm)
        (query, key, value), thin_normed = self._qkv.forward(normed)
        query, key, value = (part.unflatten(1, (-1, self._head_dim)) for part in (query, key, value))
        if kept is not None:
            kept.hidden, kept.hidden_scale, kept.normed, kept.thin_normed = hidden, hidden_scale, normed, thin_normed
            kept.query, kept.key = query, key
        query, key, head_scales = norm_rotate_forward(query, key, query_norm, key_norm, rope)
        mixed, attended = attend_by_hand(query, key, value, layout, self._scale, keeps=kept is not None)
        mixed = mixed.flatten(1)
        (middle,), thin_mixed = self._out.forward(mixed, onto=hidden)
        if kept is not None:
            kept.head_scales, kept.attended = head_scales, attended
            kept.mixed, kept.thin_mixed = mixed, thin_mixed
        return middle

    def _inner(self, middle: Tensor, kept: Kept | None) -> Float[Tensor, "tokens inner"]:
        normed, middle_scale = rms_forward(middle, *self._weights[3])
        (gate, up), thin = self._gate_up.forward(normed)
        if kept is not None:
            kept.middle, kept.middle_scale, kept.normed_middle, kept.thin_middle = middle, middle_scale, normed, thin
            kept.gate, kept.up = gate, up
        return swiglu_forward(gate, up)

    def backward(
        self, grad: Float[Tensor, "tokens width"], kept: Kept, rope: Rope, *, needs_input: bool
    ) -> tuple[Float[Tensor, "tokens width"] | None, list[Tensor | None]]:
        """Gradients of the input, None unless wanted, and of `tensors`. Uses `kept` up, leaves `grad` as it is."""
        wants_attention = needs_input or bool(self._qkv.tensors or self._out.tensors)
        grad_middle, mlp_found = self._mlp_backward(grad, kept, needs_input=wants_attention)
        grad_hidden, found = None, []
        if grad_middle is not None:
            grad_hidden, found = self._attention_backward(grad_middle, kept, rope, needs_input=needs_input)
        found = [*found, *mlp_found]
        if found and any(scale != 1 for scale in self._up_scales):
            torch._foreach_mul_(found[1::2], list(self._up_scales))  # pyright: ignore[reportPrivateImportUsage]
        return grad_hidden, [*found]

    def _mlp_backward(self, grad: Tensor, kept: Kept, *, needs_input: bool) -> tuple[Tensor | None, list[Tensor]]:
        back, down_found = self._down.adapter_gradients((grad,), kept.take("inner"), kept.take("thin_inner"))
        grad_inner = self._down.input_gradient((grad,), back)
        grads = swiglu_backward(grad_inner, kept.take("gate"), kept.take("up"))
        del grad_inner
        normed, thin = kept.take("normed_middle"), kept.take("thin_middle")
        back, found = self._gate_up.adapter_gradients(grads, normed, thin)
        found += down_found
        if not needs_input:
            return None, found
        del normed
        grad_normed = self._gate_up.input_gradient(grads, back)
        del grads
        weight, _ = self._weights[3]
        return rms_backward(grad_normed, kept.take("middle"), weight, kept.take("middle_scale")).add_(grad), found

    def _attention_backward(
        self, grad: Tensor, kept: Kept, rope: Rope, *, needs_input: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        (norm, _), (query_norm, _), (key_norm, _), _ = self._weights
        back, out_found = self._out.adapter_gradients((grad,), kept.take("mixed"), kept.take("thin_mixed"))
        grad_mixed = self._out.input_gradient((grad,), back).unflatten(1, (-1, self._head_dim))
        grad_query, grad_key, grad_value = attend_backward(grad_mixed, kept.take("attended"))
        del grad_mixed
        query, key, scales = kept.take("query"), kept.take("key"), kept.take("head_scales")
        grad_query, grad_key = norm_rotate_backward(
            grad_query, grad_key, query, key, scales, query_norm, key_norm, rope
        )
        del query, key, scales
        grads = [part.flatten(1) for part in (grad_query, grad_key, grad_value)]
        back, found = self._qkv.adapter_gradients(grads, kept.take("normed"), kept.take("thin_normed"))
        found += out_found
        if not needs_input:
            return None, found
        grad_normed = self._qkv.input_gradient(grads, back)
        return rms_backward(grad_normed, kept.take("hidden"), norm, kept.take("hidden_scale")).add_(grad), found


class _Layer(torch.autograd.Function):
    """The adapters come as inputs, so that their gradients take autograd's usual way, hooks and accumulation included."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        layer: FusedLayer,
        rope: Rope,
        layout: Layout,
        waiting: Waiting | None,
        visit: Visit | None,
        records: bool,
        *tensors: Tensor,
    ) -> Tensor:
        if visit is not None:
            visit("forward")
        kept = None
        if records and any(ctx.needs_input_grad):
            ctx.layer, ctx.rope, ctx.layout, ctx.waiting, ctx.visit = layer, rope, layout, waiting, visit
            if waiting is None:
                ctx.kept = kept = Kept()
            else:
                ctx.ticket = waiting.put(hidden)
        out = layer.forward(hidden, rope, layout, kept)
        if kept is not None and not ctx.needs_input_grad[0]:
            # The first layer behind a frozen embedding and tower: nobody asks for the way back through its first norm.
            kept.hidden = kept.hidden_scale = None
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layer: FusedLayer = ctx.layer
        if ctx.visit is not None:
            ctx.visit("backward")
        if ctx.waiting is None:
            kept, ctx.kept = ctx.kept, None
        else:
            kept = layer.again(ctx.waiting.get(ctx.ticket), ctx.rope, ctx.layout)
        grad_hidden, found = layer.backward(grads[0], kept, ctx.rope, needs_input=ctx.needs_input_grad[0])
        return grad_hidden, None, None, None, None, None, None, *found
