"""Decoding kernels on a GPU at 8B's shapes: as close to float64 as rounding once allows, also replayed from a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

BF16_STEP = 2.0**-8
RANK = 16
SHAPES = {
    "q, k, v": (4096, [4096, 1024, 1024]),
    "o": (4096, [4096]),
    "gate, up": (4096, [12288, 12288]),
    "down": (12288, [4096]),
    "4B's down": (9728, [2560]),
    "odd": (320, [200, 72, 8]),
}


def nf4_linears(inputs: int, widths: list[int], rank: int) -> list[Any]:
    """On the GPU, in 4 bits with double quantisation, and with an adapter whose both halves are random."""
    from bitsandbytes.nn import Linear4bit
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    holder = nn.ModuleDict()
    for index, width in enumerate(widths):
        linear = Linear4bit(inputs, width, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        linear.weight.data = (torch.randn(width, inputs) * torch.rand(width, 1) * 0.04).bfloat16()
        holder[f"linear{index}"] = linear
    holder = holder.cuda().requires_grad_(False)
    if rank:
        options = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(holder), init_lora_weights=False)
        holder = inject_adapter_in_model(options, holder).cuda()
    return [holder[f"linear{index}"] for index in range(len(widths))]


@torch.no_grad()
def exact(linear: Any, x: torch.Tensor) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    from lensmith.model.lora import split_linear

    part = split_linear(linear)
    assert part is not None
    y = x.double() @ dequantize_4bit(part.base.weight.data, part.base.weight.quant_state).double().T
    if part.down is None or part.up is None:
        return y
    thin = (x.double() @ part.down.bfloat16().double().T).bfloat16().double()
    return y + part.scale * thin @ part.up.bfloat16().double().T


def assert_rounded(ours: tuple[torch.Tensor, ...], theirs: list[torch.Tensor]) -> None:
    """One rounding to bf16, and what an fp32 sum of thousands of terms may be off where it cancels. A thin product at the
    edge of a rounding moves its row by half a step of the adapter's share."""
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one.double(), other, rtol=1.1 * BF16_STEP, atol=2e-3 * float(other.abs().max()))
    # Of all outputs together: roundings average to 0.4 steps, but eight numbers alone exceed 0.6 in 9 of 100 draws.
    one, other = torch.cat(ours, -1).double(), torch.cat(theirs, -1)
    assert float((one - other).norm() / other.norm()) < 0.6 * BF16_STEP


@pytest.mark.parametrize("rank", [0, RANK])
@pytest.mark.parametrize("num_rows", [1, 5, 16, 33, 64])
@pytest.mark.parametrize("name", SHAPES)
def test_outputs_are_exact_sums_rounded_once_and_the_same_every_time(name, num_rows, rank):
    from lensmith.model.few_rows import FewRows, workspace

    inputs, widths = SHAPES[name]
    linears = nf4_linears(inputs, widths, rank)
    x = torch.randn(num_rows, inputs, device="cuda").bfloat16()
    prepared = FewRows(linears)
    assert prepared.fused
    workspace(x.device).parts.fill_(float("nan"))
    first = prepared.run(x)
    assert_rounded(first, [exact(linear, x) for linear in linears])
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, prepared.run(x), strict=True))
    assert not workspace(x.device).tickets.any()


def test_rows_of_the_identity_give_the_weights_bit_for_bit():
    from lensmith.model.few_rows import project_few
    from lensmith.model.quant import dense_weight

    (linear,) = nf4_linears(4096, [4096], 0)
    weight = dense_weight(linear, torch.bfloat16).clone()
    for start in range(0, 4096, 64):
        rows = torch.zeros(64, 4096, device="cuda", dtype=torch.bfloat16)
        rows[torch.arange(64), start + torch.arange(64)] = 1
        assert torch.equal(project_few([linear], rows)[0].T, weight[:, start : start + 64])


@pytest.mark.parametrize("num_rows", [1, 16, 33])
def test_gated_and_residual_forms_are_the_plain_ones_with_what_follows(num_rows):
    from lensmith.model.few_rows import FewRows

    pair = nf4_linears(4096, [12288, 12288], RANK)
    x = torch.randn(num_rows, 4096, device="cuda").bfloat16()
    gate, up = FewRows(pair).run(x)
    (ours,) = FewRows(pair, gated=True).run(x)
    assert_close(ours, nn.functional.silu(gate) * up, rtol=6 * BF16_STEP, atol=5e-3)
    single = nf4_linears(12288, [4096], RANK)
    prepared, residual = FewRows(single), torch.randn(num_rows, 4096, device="cuda").bfloat16()
    assert torch.equal(prepared.run(ours, residual)[0], prepared.run(ours)[0] + residual)


def test_a_graph_replays_with_new_rows_and_refreshed_adapters():
    from lensmith.model.few_rows import FewRows

    linears = nf4_linears(4096, [4096, 1024, 1024], RANK)
    prepared, x = FewRows(linears), torch.randn(8, 4096, device="cuda").bfloat16()
    prepared.run(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = prepared.run(x)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        with torch.no_grad():
            linears[1].lora_B["default"].weight.mul_(-1.5)
        prepared.refresh()
        graph.replay()
        for ours, linear in zip(outputs, linears, strict=True):
            assert_rounded((ours,), [exact(linear, x)])


def attention_inputs(groups: int, group_size: int, prefix: int, own: int) -> list[Any]:
    sequences, kv_heads, heads, width = groups * group_size, 8, 32, 128
    draw = lambda *shape: torch.randn(*shape, device="cuda").bfloat16()  # noqa: E731
    caches = [draw(units, keys, kv_heads, width) for units, keys in ((groups, prefix), (sequences, own)) for _ in "kv"]
    lengths = [
        torch.randint(1, capacity + 1, (units,), device="cuda", dtype=torch.int32)
        for units, capacity in ((groups, prefix), (sequences, own))
    ]
    for cache, length in zip(caches, (lengths[0], lengths[0], lengths[1], lengths[1]), strict=True):
        beyond = torch.arange(cache.shape[1], device="cuda") >= length[:, None]
        cache[beyond] = float("nan")
    return [draw(sequences, heads, width), *caches[:2], lengths[0], *caches[2:], lengths[1], width**-0.5]


@pytest.mark.parametrize(
    ("groups", "group_size", "prefix", "own"), [(1, 8, 700, 256), (8, 8, 1500, 300), (2, 5, 65, 1), (1, 64, 2000, 100)]
)
def test_attention_is_the_plain_form_in_float64(groups, group_size, prefix, own):
    from lensmith.model.decode_attention import attend_decode, attend_plainly

    torch.manual_seed(groups)
    arguments = attention_inputs(groups, group_size, prefix, own)
    exactly = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    ours, theirs = attend_decode(*arguments), attend_plainly(*exactly)
    # Shares are rounded to bf16 on their way to the tensor cores, and the output once more.
    assert_close(ours.double(), theirs, rtol=2 * BF16_STEP, atol=2 * BF16_STEP * float(theirs.abs().max()))
    assert float((ours.double() - theirs).norm() / theirs.norm()) < BF16_STEP
    assert torch.equal(ours, attend_decode(*arguments))


def test_a_graph_decodes_token_after_token():
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm, apply_rotary_pos_emb

    from lensmith.model.decode_attention import attend_decode, attend_plainly, write_decode

    torch.manual_seed(1)
    _, prefix_k, prefix_v, prefix_lengths, own_k, own_v, _, scale = attention_inputs(2, 4, 300, 70)
    norms = [Qwen3VLTextRMSNorm(128).cuda().bfloat16() for _ in range(2)]
    position, rows = torch.zeros(1, dtype=torch.int32, device="cuda"), torch.empty(8, 48, 128, device="cuda").bfloat16()
    rope = tuple(torch.empty(8, 128, device="cuda").bfloat16() for _ in range(2))

    @torch.no_grad()
    def step() -> tuple[torch.Tensor, torch.Tensor]:
        query, key, value = rows.split([32, 8, 8], dim=1)
        query = write_decode(query, key, value, norms[0], norms[1], rope, own_k, own_v, position)
        return query, attend_decode(query, prefix_k, prefix_v, prefix_lengths, own_k, own_v, position + 1, scale)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rotated, mixed = step()
    for token in range(5):
        rows.copy_(torch.randn_like(rows))
        angles = torch.rand(8, 64, device="cuda") * 6
        rope[0].copy_(torch.cat([angles, angles], -1).cos())
        rope[1].copy_(torch.cat([angles, angles], -1).sin())
        position.fill_(token)
        graph.replay()
        with torch.no_grad():
            query, key = apply_rotary_pos_emb(norms[0](rows[:, :32]), norms[1](rows[:, 32:40]), *rope)
        assert_close(rotated, query, rtol=2 * BF16_STEP, atol=2 * BF16_STEP)
        assert_close(own_k[:, token], key, rtol=2 * BF16_STEP, atol=2 * BF16_STEP)
        assert torch.equal(own_v[:, token], rows[:, 40:])
        caches = [t.double() for t in (own_k, own_v)]
        theirs = attend_plainly(
            rotated.double(), prefix_k.double(), prefix_v.double(), prefix_lengths, *caches, position + 1, scale
        )
        assert_close(mixed.double(), theirs, rtol=2 * BF16_STEP, atol=2 * BF16_STEP * float(theirs.abs().max()))
