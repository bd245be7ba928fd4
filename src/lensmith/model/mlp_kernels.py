"""silu(gate) * up and its gradients in one launch each, values in stretches of 1,024 whatever the width of a row.

    out       = round(silu(gate)) * up                                     as Qwen3VLTextMLP rounds
    grad_up   = grad silu(gate)
    grad_gate = grad up sigmoid(gate) (1 + gate (1 - sigmoid(gate)))       both in fp32, rounded once

Liger's kernels do the same and take the GPU as long; the host they take 79 us a call where these take 27 (docs/log.md
2026-11-25).
"""

from __future__ import annotations

import triton
import triton.language as tl

from lensmith.model.launch import Launcher

BLOCK = 1024


@triton.jit
def gated(gate, up, out, num_values, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_values
    g, u = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32), tl.load(up + at, mask=inside, other=0.0)
    tl.store(out + at, (g * tl.sigmoid(g)).to(u.dtype) * u, mask=inside)


@triton.jit
def gated_back(grad, gate, up, num_values, BLOCK: tl.constexpr):
    """The gradients take the places of `gate` and `up`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_values
    d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    open_by = tl.sigmoid(g)
    kind = gate.dtype.element_ty
    tl.store(up + at, (d * g * open_by).to(kind), mask=inside)
    tl.store(gate + at, (d * u * open_by * (1 + g * (1 - open_by))).to(kind), mask=inside)


launch_gated, launch_gated_back = Launcher(gated), Launcher(gated_back)
