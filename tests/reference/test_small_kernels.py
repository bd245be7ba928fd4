"""Gated MLPs and sums of shared keys in one launch each: interpreted on the CPU, against float64's autograd."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lensmith.model.flash import Run, build_varlen


def gated_case(tokens: int, inner: int, dtype: Any) -> Any:
    """By the kernels and by float64's autograd: result, gradients of gate and up."""
    from lensmith.model import kernels

    generator = torch.Generator().manual_seed(inner)
    gate, up, grad = (
        (torch.randn(tokens, inner, generator=generator, dtype=torch.float64) * 2).to(dtype) for _ in range(3)
    )
    leaves = [part.double().requires_grad_() for part in (gate, up)]
    exact = torch.nn.functional.silu(leaves[0]) * leaves[1]
    wanted = [exact.detach(), *torch.autograd.grad(exact, leaves, grad.double())]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_fused", lambda x: True)
        out = kernels.swiglu_forward(gate, up)
        found = kernels.swiglu_backward(grad, gate, up)
    assert found[0] is gate, "the gradients take the places of what went in"
    return [out, *found], wanted


@pytest.mark.parametrize(("tokens", "inner"), [(3, 1536), (5, 7), (64, 16)])
def test_a_gated_product_and_its_gradients_are_the_plain_ones(interpreted, tokens, inner):
    for ours, wanted in zip(*interpreted(gated_case, tokens, inner, torch.float32), strict=True):
        assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-6)
    ours, wanted = interpreted(gated_case, tokens, inner, torch.float16)
    for found, expected in zip(ours, wanted, strict=True):
        assert float((found.double() - expected).norm() / expected.norm()) < torch.finfo(torch.float16).eps


RUNS = [Run(6, ((0, 6),)), Run(3, ((0, 6), (6, 9))), Run(5, ((0, 6), (9, 14))), Run(2, ((14, 16),))]
"""A prompt, two branches on it, and a sample of its own."""


def shared_case(dtype: Any, kv_heads: int, width: int) -> Any:
    from lensmith.model import flash

    layout = build_varlen(RUNS, 16, True, torch.from_numpy)
    assert layout.gather is not None
    assert layout.readers is not None
    generator = torch.Generator().manual_seed(0)
    grads = [
        torch.randn(len(layout.gather), kv_heads, width, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(2)
    ]
    wanted = [
        torch.zeros(16, kv_heads, width, dtype=torch.float64).index_add_(0, layout.gather, grad.double())
        for grad in grads
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash, "_sums_at_once", lambda grad: True)
        ours = flash.ungather(grads[0], grads[1], layout)
    plain = flash.ungather(grads[0], grads[1], layout)
    return ours, plain, wanted


@pytest.mark.parametrize(("kv_heads", "width"), [(8, 128), (3, 16), (10, 128)])
def test_gradients_of_shared_keys_are_summed_to_where_they_came_from(interpreted, kv_heads, width):
    for ours, plain, wanted in zip(*interpreted(shared_case, torch.float32, kv_heads, width), strict=True):
        assert_close(ours.double(), wanted, rtol=1e-6, atol=1e-6)
        assert_close(plain.double(), wanted, rtol=1e-6, atol=1e-6)


def test_rows_without_company_are_given_back_as_they_are(interpreted):
    for ours, _, wanted in zip(*interpreted(shared_case, torch.float16, 2, 16), strict=True):
        assert torch.equal(ours[14:].double(), wanted[14:])
        assert_close(ours.double(), wanted, rtol=2**-11, atol=1e-3)


def test_a_row_that_nobody_reads_gets_nothing():
    layout = build_varlen([Run(2, ((0, 2),)), Run(2, ((0, 1), (3, 5)))], 5, True, torch.from_numpy)
    assert layout.readers is not None
    order, starts = layout.readers
    assert np.diff(starts).tolist() == [2, 1, 0, 1, 1]
    assert layout.gather is not None
    assert layout.gather[order.long()].tolist() == [0, 0, 1, 3, 4]
