"""Norm and rotation of all heads in one kernel each way are the module's norm and rotation, in float64, end to end.

The kernels are interpreted on the CPU in a process of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

EPS = 1e-6
TOKENS = 7


def make_heads(heads, kv_heads, width, dtype, *, views) -> Any:
    """Queries, keys, gradients of both, weights of both norms, and the rope; `views` have rows further apart."""
    generator = torch.Generator().manual_seed(heads + width)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    if views:
        query, key, _ = (draw(TOKENS, heads + 2 * kv_heads, width) * 3).split([heads, kv_heads, kv_heads], dim=1)
        # Of one product as well, and heads before tokens, as the padded form of attention returns them.
        grads = [draw(TOKENS, heads + kv_heads, width)[:, :heads], draw(kv_heads, TOKENS, width).transpose(0, 1)]
    else:
        query, key = draw(TOKENS, heads, width) * 3, draw(TOKENS, kv_heads, width) * 3
        grads = [draw(TOKENS, heads, width), draw(TOKENS, kv_heads, width)]
    angles = torch.rand(TOKENS, width // 2, generator=generator, dtype=torch.float64) * 6
    rope = tuple(torch.cat([turned, turned], -1).to(dtype) for turned in (angles.cos(), angles.sin()))
    return query, key, grads, [1 + 0.3 * draw(width), 1 + 0.3 * draw(width)], rope


def plain(x, weight, rope):
    """Qwen3VLTextRMSNorm and apply_rotary_pos_emb of one row of heads, in the type of x."""
    cos, sin = (part.to(x.dtype)[:, None] for part in rope)
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight.to(x.dtype)
    first, second = normed.chunk(2, -1)
    return normed * cos + torch.cat([-second, first], -1) * sin


def exact(query, key, grads, weights, rope):
    """Rotated queries and keys and the gradients of both, by float64's autograd."""
    leaves = [part.double().requires_grad_() for part in (query, key)]
    out = [plain(leaf, weight, rope) for leaf, weight in zip(leaves, weights, strict=True)]
    return [*(part.detach() for part in out), *torch.autograd.grad(out, leaves, [part.double() for part in grads])]


def step_by_step(query, key, grads, weights, rope):
    """The same by the steps that take more launches."""
    from lensmith.model import kernels

    scaled = [kernels.rms_forward(x, w, EPS) for x, w in zip((query, key), weights, strict=True)]
    out = kernels.rotate_forward(scaled[0][0], scaled[1][0], rope)
    back = kernels.rotate_backward(grads[0].clone(), grads[1].clone(), rope)
    found = [
        kernels.rms_backward(grad, x, weight, scale)
        for grad, x, weight, (_, scale) in zip(back, (query, key), weights, scaled, strict=True)
    ]
    return [*out, *found]


def round_to_nearest(patch):
    """Triton's interpreter cuts fp32 off to bf16; a GPU rounds to the nearest."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, mode)
        return torch.from_numpy(np.array(values)).bfloat16().view(torch.int16).numpy().view(np.uint16)

    patch.setattr(interpreter, "_convert_float", rounded)


def kernel_case(heads, kv_heads, width, dtype, views):
    """By the kernels, in float64, and step by step; whether what was given is as it was."""
    from lensmith.model import kernels

    query, key, grads, weights, rope = given = make_heads(heads, kv_heads, width, dtype, views=views)
    wanted, steps = exact(*given), step_by_step(*given)
    before = query.clone(), key.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_fused", lambda x: True)
        patch.setattr(kernels, "_heads_kernel_agrees", lambda device, dtype: True)
        round_to_nearest(patch)
        q_norm, k_norm = ((weight, EPS) for weight in weights)
        to_query, to_key, scales = kernels.norm_rotate_forward(query, key, q_norm, k_norm, rope)
        assert scales.shape == (TOKENS, heads + kv_heads)
        back = kernels.norm_rotate_backward(grads[0], grads[1], query, key, scales, weights[0], weights[1], rope)
    assert torch.equal(query, before[0])
    assert torch.equal(key, before[1])
    return [to_query, to_key, *back], wanted, steps


SHAPES = [(32, 8, 128), (4, 2, 16), (20, 3, 32)]
"""That of 8B, that of the tiny model, and heads that fill no block."""


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), SHAPES)
def test_in_fp32_the_kernels_are_the_plain_formula_and_its_gradient(interpreted, heads, kv_heads, width, views):
    ours, wanted, _ = interpreted(kernel_case, heads, kv_heads, width, torch.float32, views)
    for found, expected in zip(ours, wanted, strict=True):
        assert found.dtype is torch.float32
        assert_close(found.double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), SHAPES)
def test_in_16_bits_the_kernels_err_no_more_than_step_by_step(interpreted, heads, kv_heads, width, views, dtype):
    ours, wanted, steps = interpreted(kernel_case, heads, kv_heads, width, dtype, views)
    for found, expected, before in zip(ours, wanted, steps, strict=True):
        assert found.dtype is dtype
        errors = [float((part.double() - expected).norm() / expected.norm()) for part in (found, before)]
        # The steps round at more places. Three roundings of at most half a unit each are under one on average.
        assert errors[0] <= errors[1], f"relative error {errors[0]:.2e}, step by step {errors[1]:.2e}"
        assert errors[0] <= torch.finfo(dtype).eps


def test_elsewhere_it_is_step_by_step():
    from lensmith.model import kernels

    given = make_heads(4, 2, 16, torch.float64, views=False)
    query, key, grads, weights, rope = given
    to_query, to_key, scales = kernels.norm_rotate_forward(query, key, (weights[0], EPS), (weights[1], EPS), rope)
    back = kernels.norm_rotate_backward(grads[0], grads[1], query, key, scales, weights[0], weights[1], rope)
    for found, expected in zip([to_query, to_key, *back], exact(*given), strict=True):
        assert_close(found, expected)


def agreement(spoil):
    """Whether the kernels are trusted, and what is said, where nothing records and, with `spoil`, results are 10 % off."""
    import warnings

    from lensmith.model import kernels

    once = kernels._norm_rotate_once

    def spoilt(*given):
        query, key, scales = once(*given)
        return query, key * 1.1, scales

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as said, torch.inference_mode():
        patch.setattr(kernels, "_fused", lambda x: True)
        patch.setattr(torch.cuda, "get_device_name", lambda device: "this card")
        if spoil:
            patch.setattr(kernels, "_norm_rotate_once", spoilt)
        found = kernels._heads_kernel_agrees.__wrapped__(torch.device("cpu"), torch.bfloat16)
    return found, [str(warning.message) for warning in said]


def test_kernels_that_err_on_a_card_are_not_used_there_and_that_is_said(interpreted):
    assert interpreted(agreement, False) == (True, [])
    found, said = interpreted(agreement, True)
    assert not found
    assert len(said) == 1
    assert said[0].startswith("this card: norm and rotation go through three kernels instead of one")
