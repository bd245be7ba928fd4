"""Small steps of the decoder: a fused kernel where one exists, the stock module everywhere else.

Triton kernels, Liger's and ours, run on CUDA in 16-bit types; each step below computes what transformers' module computes.
A plain RMSNorm is four passes over memory, the fused one two; at 6,000 tokens of 8B that is 0.02 s per forward pass.

`rms_norm`, `rotate` and `swiglu` are steps of autograd's graph. The pairs of `_forward` and `_backward` after them record
nothing: they are what a layer with a backward pass of its own is made of (see lensmith.model.layer). Gradients that they
are given are theirs to write into.
"""

from __future__ import annotations

import functools
import warnings
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers.models.qwen3_vl import modeling_qwen3_vl

from lensmith.model.lora import project


@cache
def liger_available() -> bool:
    """Whether Liger's kernels can be imported (Linux with Triton)."""
    try:
        import liger_kernel.ops  # noqa: F401
    except ImportError:
        return False
    return True


WIDE = 1024
"""Rows this wide go through torch's own RMSNorm, which takes the host a sixth of what a Triton kernel does (99 us a call on
the machine of docs/log.md); for the many narrow rows of heads it takes the GPU longer."""


@cache
def torch_has_rms() -> bool:
    """Whether this torch has RMSNorm as one kernel in each direction."""
    return hasattr(torch.ops.aten, "_fused_rms_norm") and hasattr(torch.ops.aten, "_fused_rms_norm_backward")


def _fused(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and liger_available()


def rms_norm(norm: Any, x: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
    """x / rms(x) * weight, the mean of squares in fp32."""
    if not _fused(x):
        return norm(x)
    if x.shape[-1] >= WIDE and torch_has_rms():
        return torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], norm.weight, norm.variance_epsilon)[0]
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # "llama" casting: normalise in fp32, multiply by the weight in the input's type, as Qwen3VLTextRMSNorm does.
    return LigerRMSNormFunction.apply(x, norm.weight, norm.variance_epsilon, 0.0, "llama", False)


def rotate(
    query: Float[Tensor, "queries heads width"],
    key: Float[Tensor, "keys kv_heads width"],
    rope: tuple[Float[Tensor, "keys width"], Float[Tensor, "keys width"]],
    kept: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Rotary embedding of queries and keys; `kept` names the key rows that the queries come from, None for all."""
    cos, sin = rope
    if kept is None:
        if _fused(query):
            return _rotate_fused(query, key, cos, sin)
        return modeling_qwen3_vl.apply_rotary_pos_emb(query, key, cos, sin)
    query, _ = modeling_qwen3_vl.apply_rotary_pos_emb(query, query, cos[kept], sin[kept])
    key, _ = modeling_qwen3_vl.apply_rotary_pos_emb(key, key, cos, sin)
    return query, key


def _rotate_fused(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.rope import LigerRopeFunction

    # Liger takes [batch, heads, tokens, width] and works on [batch, tokens, heads, width] inside: no copy either way.
    batched = LigerRopeFunction.apply(query[None].transpose(1, 2), key[None].transpose(1, 2), cos[None], sin[None])
    return tuple(part[0].transpose(0, 1) for part in batched)  # type: ignore[return-value]


def swiglu(mlp: Any, x: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
    """down(silu(gate(x)) * up(x))"""
    gate, up = project((mlp.gate_proj, mlp.up_proj), x)
    if not _fused(x):
        return project((mlp.down_proj,), mlp.act_fn(gate) * up)[0]
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return project((mlp.down_proj,), LigerSiLUMulFunction.apply(gate, up))[0]


def rms_forward(
    x: Float[Tensor, "... width"], weight: Float[Tensor, " width"], eps: float
) -> tuple[Float[Tensor, "... width"], Tensor]:
    """RMSNorm, and 1 / rms(x) for the way back."""
    if _fused(x) and x.shape[-1] >= WIDE and torch_has_rms():
        return torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], weight, eps)
    if _fused(x):
        from liger_kernel.ops.rms_norm import rms_norm_forward

        normed, _, scale, *_ = rms_norm_forward(x, weight, eps, 0.0, "llama", None)
        return normed, scale
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype), scale


def rms_backward(
    grad: Float[Tensor, "... width"],
    x: Float[Tensor, "... width"],
    weight: Float[Tensor, " width"],
    scale: Tensor,
) -> Float[Tensor, "... width"]:
    """Gradient of an RMSNorm's input; `x` and `scale` as in and from `rms_forward`. Its weight is frozen."""
    if _fused(x) and x.shape[-1] >= WIDE and torch_has_rms():
        wanted = [True, False]
        return torch.ops.aten._fused_rms_norm_backward(grad, x, [x.shape[-1]], scale, weight, wanted)[0]
    if _fused(x):
        from liger_kernel.ops.rms_norm import rms_norm_backward
        from liger_kernel.ops.utils import calculate_settings

        settings = calculate_settings(x.shape[-1])
        flat = x.view(-1, x.shape[-1])
        return rms_norm_backward(grad, flat, weight, scale, 0.0, _liger_casting(), *settings, True, None, False)[0]
    hat = x.to(scale.dtype) * scale
    inner = (grad * weight).to(scale.dtype)
    return ((inner - hat * (inner * hat).mean(-1, keepdim=True)) * scale).to(x.dtype)


@cache
def _liger_casting() -> int:
    """The number that Liger's forward makes of "llama", and that its backward expects."""
    from liger_kernel.ops.rms_norm import _str_to_casting_mode

    return _str_to_casting_mode["llama"]


def rotate_forward(
    query: Float[Tensor, "tokens heads width"], key: Float[Tensor, "tokens kv_heads width"], rope: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Rotary embedding; what is given may be written into."""
    if _fused(query):
        from liger_kernel.ops.rope import rope_forward

        query, key, _, _ = rope_forward(query[None].transpose(1, 2), key[None].transpose(1, 2), *rope)
        return query[0].transpose(0, 1), key[0].transpose(0, 1)
    return modeling_qwen3_vl.apply_rotary_pos_emb(query, key, *rope)


def rotate_backward(
    grad_query: Float[Tensor, "tokens heads width"],
    grad_key: Float[Tensor, "tokens kv_heads width"],
    rope: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Gradients before the rotary embedding: those after it, turned back by the same angles."""
    if _fused(grad_query):
        from liger_kernel.ops.rope import rope_backward

        batched = rope_backward(grad_query[None].transpose(1, 2), grad_key[None].transpose(1, 2), *rope)
        return tuple(part[0].transpose(0, 1) for part in batched)  # type: ignore[return-value]
    return modeling_qwen3_vl.apply_rotary_pos_emb(grad_query, grad_key, rope[0], -rope[1])


Norm = tuple[Float[Tensor, " width"], float]
"""Weight and epsilon of an RMSNorm."""


def norm_rotate_forward(
    query: Float[Tensor, "tokens heads width"],
    key: Float[Tensor, "tokens kv_heads width"],
    query_norm: Norm,
    key_norm: Norm,
    rope: tuple[Float[Tensor, "tokens width"], Float[Tensor, "tokens width"]],
) -> tuple[Float[Tensor, "tokens heads width"], Float[Tensor, "tokens kv_heads width"], Any]:
    """RMSNorm and rotary embedding of every head, and both norms' 1 / rms for `norm_rotate_backward`: one launch.

    What is given may be a view with rows further apart (as of stacked projections), and stays as it is.
    """
    if _takes_heads(query, query_norm[0]) and _heads_kernel_agrees(query.device, query.dtype):
        return _norm_rotate_once(query, key, query_norm, key_norm, rope)
    query, query_scale = rms_forward(query, *query_norm)
    key, key_scale = rms_forward(key, *key_norm)
    query, key = rotate_forward(query, key, rope)
    return query, key, (query_scale, key_scale)


def _norm_rotate_once(
    query: Tensor, key: Tensor, query_norm: Norm, key_norm: Norm, rope: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    from lensmith.model.head_kernels import BLOCK, launch_norm_rotate

    query, key = _heads_together(query), _heads_together(key)
    (tokens, heads, width), kv_heads = query.shape, key.shape[1]
    (query_weight, query_eps), (key_weight, key_eps), (cos, sin) = query_norm, key_norm, rope
    to_query, to_key = query.new_empty(query.shape), key.new_empty(key.shape)
    scales = query.new_empty((tokens, heads + kv_heads), dtype=torch.float32)
    launch_norm_rotate(
        (tokens, -(-heads // BLOCK) - (-kv_heads // BLOCK)),
        (query, key, query_weight, key_weight, cos.contiguous(), sin.contiguous(), to_query, to_key, scales),
        (query.stride(0), key.stride(0)),
        (query_eps, key_eps),
        (heads, kv_heads, width, BLOCK),
    )
    return to_query, to_key, scales


def norm_rotate_backward(
    grad_query: Float[Tensor, "tokens heads width"],
    grad_key: Float[Tensor, "tokens kv_heads width"],
    query: Float[Tensor, "tokens heads width"],
    key: Float[Tensor, "tokens kv_heads width"],
    scales: Any,
    query_weight: Float[Tensor, " width"],
    key_weight: Float[Tensor, " width"],
    rope: tuple[Float[Tensor, "tokens width"], Float[Tensor, "tokens width"]],
) -> tuple[Float[Tensor, "tokens heads width"], Float[Tensor, "tokens kv_heads width"]]:
    """Gradients of `query` and `key` as `norm_rotate_forward` was given them; `scales` from it. The weights are frozen."""
    if not isinstance(scales, Tensor):
        grad_query, grad_key = rotate_backward(grad_query, grad_key, rope)
        grad_query = rms_backward(grad_query, query, query_weight, scales[0])
        return grad_query, rms_backward(grad_key, key, key_weight, scales[1])
    from lensmith.model.head_kernels import BLOCK, launch_norm_rotate_back

    query, key, cos, sin = _heads_together(query), _heads_together(key), rope[0].contiguous(), rope[1].contiguous()
    grad_query, grad_key = _heads_together(grad_query), _heads_together(grad_key)
    (tokens, heads, width), kv_heads = query.shape, key.shape[1]
    launch_norm_rotate_back(
        (tokens, -(-heads // BLOCK) - (-kv_heads // BLOCK)),
        (grad_query, grad_key, query, key, scales, query_weight, key_weight, cos, sin),
        (grad_query.stride(0), grad_key.stride(0), query.stride(0), key.stride(0)),
        (),
        (heads, kv_heads, width, BLOCK),
    )
    return grad_query, grad_key


def _takes_heads(query: Float[Tensor, "tokens heads width"], weight: Tensor) -> bool:
    """Whether the kernels of all heads take this: a head is a power of two wide, its norm's weight of its type."""
    width = query.shape[-1]
    return _fused(query) and width >= 16 and width.bit_count() == 1 and weight.dtype is query.dtype


@cache
def _heads_kernel_agrees(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels, as built for this card, compute what they should; asked once, and where not, said."""
    from triton.errors import TritonError

    try:
        with torch.inference_mode(False), torch.enable_grad():
            apart = _heads_kernel_error(device, dtype)
        reason = f"its results are {apart:.1%} apart"
    except (RuntimeError, TritonError) as cause:
        apart, reason = float("inf"), str(cause).partition("\n")[0]
    if apart <= 2 * torch.finfo(dtype).eps:
        return True
    warnings.warn(
        f"{torch.cuda.get_device_name(device)}: norm and rotation go through three kernels instead of one, which does not "
        f"work here ({reason}). Training is exact, and a little slower where packs are short.",
        stacklevel=2,
    )
    return False


def _heads_kernel_error(device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative error among results and gradients of three made-up tokens, against fp32."""
    generator = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, device=device)
    query, key, *grads = (draw(3, heads, 128).to(dtype) for heads in (4, 2, 4, 2))
    weights = [(1 + 0.3 * draw(128)).to(dtype) for _ in range(2)]
    angle = draw(3, 64)
    rope = (torch.cat([angle.cos()] * 2, -1).to(dtype), torch.cat([angle.sin()] * 2, -1).to(dtype))
    leaves = [x.float().requires_grad_() for x in (query, key)]
    normed = [F.rms_norm(x, (128,), weight.float(), 1e-6) for x, weight in zip(leaves, weights, strict=True)]
    cos, sin = (part.float() for part in rope)
    rotated = modeling_qwen3_vl.apply_rotary_pos_emb(normed[0], normed[1], cos, sin)
    exact = [*rotated, *torch.autograd.grad(rotated, leaves, [grad.float() for grad in grads])]
    *once, scales = _norm_rotate_once(query, key, (weights[0], 1e-6), (weights[1], 1e-6), rope)
    once += norm_rotate_backward(grads[0], grads[1], query, key, scales, weights[0], weights[1], rope)
    return max(
        float((ours - right).detach().norm() / right.detach().norm()) for ours, right in zip(once, exact, strict=True)
    )


def _heads_together(rows: Float[Tensor, "tokens heads width"]) -> Float[Tensor, "tokens heads width"]:
    """Heads of a row one after the other and no row over another; a copy where they are not."""
    row, head, one = rows.stride()
    _, heads, width = rows.shape
    return rows if one == 1 and head == width and row >= heads * width else rows.contiguous()


def swiglu_forward(gate: Float[Tensor, "tokens inner"], up: Float[Tensor, "tokens inner"]) -> Tensor:
    """silu(gate) * up"""
    if not _fused(gate):
        return F.silu(gate) * up
    from lensmith.model.mlp_kernels import BLOCK, launch_gated

    gate, up = gate.contiguous(), up.contiguous()
    out, num_values = torch.empty_like(gate), gate.numel()
    launch_gated((-(-num_values // BLOCK), 1), (gate, up, out), (num_values,), (), (BLOCK,))
    return out


def swiglu_backward(grad: Float[Tensor, "tokens inner"], gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, which may be written over with them."""
    if not _fused(gate):
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)
    from lensmith.model.mlp_kernels import BLOCK, launch_gated_back

    grad, gate, up, num_values = grad.contiguous(), gate.contiguous(), up.contiguous(), gate.numel()
    launch_gated_back((-(-num_values // BLOCK), 1), (grad, gate, up), (num_values,), (), (BLOCK,))
    return gate, up
