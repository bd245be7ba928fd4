"""On a GPU: kernels launched without Triton's own way to them compute the same, whatever they are given, and faster."""

from __future__ import annotations

import functools
import time
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lensmith.model import kernels
from lensmith.model.flash import Run, build_varlen, ungather
from lensmith.model.head import token_logprobs
from lensmith.model.launch import Launcher, direct_launches_work

CALLS = 200


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").bfloat16()


def test_the_short_way_works_here_and_takes_less_of_the_hosts_time():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        direct_launches_work.cache_clear()
        assert direct_launches_work()
    from lensmith.model.mlp_kernels import BLOCK, gated

    gate, up = draw(16, 4096), draw(16, 4096, seed=1)
    out = torch.empty_like(gate)
    grid, count = (-(-gate.numel() // BLOCK), 1), gate.numel()
    for options in ({}, {"enable_fp_fusion": False}):
        short_way, long_way = Launcher(gated, **options), gated[grid]
        short = host_us(functools.partial(short_way, grid, (gate, up, out), (count,), (), (BLOCK,)))
        long = host_us(functools.partial(long_way, gate, up, out, count, BLOCK, **options))
        print(f"host time of a launch with options {options}: {long:.1f} us Triton's own way, {short:.1f} us ours")
        assert short < long


def host_us(call: Any) -> float:
    """Microseconds until a call returns, the best of three rounds."""
    call()
    rounds = []
    for _ in range(3):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(CALLS):
            call()
        rounds.append((time.perf_counter() - begun) / CALLS * 1e6)
    torch.cuda.synchronize()
    return min(rounds)


@pytest.mark.parametrize(("tokens", "inner"), [(1000, 12288), (3, 7), (5, 48)])
def test_gated_products_err_no_more_than_rounding(tokens, inner):
    gate, up, grad = (draw(tokens, inner, seed=seed) for seed in range(3))
    leaves = [part.double().requires_grad_() for part in (gate, up)]
    exact = F.silu(leaves[0]) * leaves[1]
    wanted = [exact.detach(), *torch.autograd.grad(exact, leaves, grad.double())]
    for _ in range(2):  # the second time by the short way
        out = kernels.swiglu_forward(gate, up)
        found = [out, *kernels.swiglu_backward(grad, gate.clone(), up.clone())]
    for ours, expected in zip(found, wanted, strict=True):
        assert float((ours.double() - expected).norm() / expected.norm()) < torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("kv_heads", [8, 3])
def test_gradients_of_shared_keys_are_summed_in_fp32_and_rounded_once(kv_heads):
    runs = [Run(935, ((0, 935),)), *(Run(200, ((0, 935), (935 + 200 * n, 1135 + 200 * n))) for n in range(8))]
    layout = build_varlen(runs, 2535, True, lambda array: torch.from_numpy(array).cuda())
    assert layout.gather is not None
    grads = [draw(len(layout.gather), kv_heads, 128, seed=seed) for seed in (1, 2)]
    wanted = [
        torch.zeros(2535, kv_heads, 128, device="cuda", dtype=torch.float64).index_add_(0, layout.gather, g.double())
        for g in grads
    ]
    for _ in range(2):
        found = ungather(grads[0], grads[1], layout)
    for ours, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=2.0**-8, atol=1e-4)


def test_a_head_of_8b_over_many_rows_takes_products_on_even_rows():
    """Pieces of an odd number of words went through kernels that load 2 bytes at a time: 36 ms for what takes 6."""
    hidden, head = draw(1600, 4096).requires_grad_(), draw(151_936, 4096, seed=1) * 0.02
    targets = torch.randint(0, 151_936, (1600,), device="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
        token_logprobs(hidden, head, targets).sum().backward()
    names = [event.key for event in prof.key_averages()]
    assert not [name for name in names if "align1" in name or "align2" in name], names
    took = sum(event.self_device_time_total for event in prof.key_averages()) / 1000
    print(f"head of 8B over 1,600 rows: {took:.1f} ms of the GPU")
