"""NF4 with double quantisation to bf16 in one kernel, bit for bit what bitsandbytes computes in three calls.

    scale of a block of 64 = (one of 256 values)[8 bits] * scale of 256 scales + offset          fp32, no fused multiply-add
    weight                 = (one of 16 values)[4 bits] * scale of its block                      rounded once

At a thousand tokens per pass a layer's time is that of launching kernels, and half of them used to be these.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lensmith.model.launch import Launcher

BLOCK, SCALES_PER_SCALE = 64, 256
"""Values that share a scale, and scales that share one: bitsandbytes' own for 4 bits with compress_statistics."""
BYTES = 1024
"""Packed bytes per program: 32 blocks."""


@triton.jit
def _widen(packed, scales, scale_map, scale_scales, offset, value_map, out, num_bytes, BYTES: tl.constexpr):
    at = tl.program_id(0) * BYTES + tl.arange(0, BYTES)
    inside = at < num_bytes
    pair = tl.load(packed + at, mask=inside, other=0)
    block = at // 32  # BLOCK values are 32 bytes
    code = tl.load(scales + block, mask=inside, other=0).to(tl.int32)
    scale = tl.load(scale_map + code) * tl.load(scale_scales + block // 256, mask=inside, other=0.0) + tl.load(offset)
    high = tl.load(value_map + (pair >> 4).to(tl.int32)) * scale
    low = tl.load(value_map + (pair & 15).to(tl.int32)) * scale
    values = tl.interleave(high, low)
    to = tl.program_id(0) * BYTES * 2 + tl.arange(0, BYTES * 2)
    tl.store(out + to, values.to(out.dtype.element_ty), mask=to < num_bytes * 2)


def can_widen(state: Any) -> bool:
    """Whether a bitsandbytes QuantState is of the kind that the kernel reads."""
    return (
        state.nested
        and state.quant_type == "nf4"
        and state.blocksize == BLOCK
        and state.state2.blocksize == SCALES_PER_SCALE
        and state.absmax.is_cuda
    )


# As bitsandbytes rounds: a product and a sum, not both in one.
_launch_widen = Launcher(_widen, enable_fp_fusion=False)


def widen(packed: Tensor, state: Any, out: Tensor) -> Tensor:
    """The weight in `out`, whose type is that of the result."""
    num_bytes, scales = -(-out.numel() // 2), state.state2
    tensors = (packed, state.absmax, scales.code, scales.absmax, state.offset, state.code, out)
    _launch_widen((triton.cdiv(num_bytes, BYTES), 1), tensors, (num_bytes,), (), (BYTES,))
    return out
