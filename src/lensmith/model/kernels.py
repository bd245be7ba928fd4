"""Small steps of the decoder: a fused kernel where one exists, the stock module everywhere else.

Liger's Triton kernels run on CUDA in 16-bit types; each step below computes what transformers' module computes. A plain
RMSNorm is four passes over memory, the fused one two; at 6,000 tokens of 8B that is 0.02 s per forward pass.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
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


def _fused(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and liger_available()


def rms_norm(norm: Any, x: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
    """x / rms(x) * weight, the mean of squares in fp32."""
    if not _fused(x):
        return norm(x)
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
