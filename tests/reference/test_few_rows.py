"""A few rows through NF4 linears: the kernel, interpreted on the CPU, against float64 on bitsandbytes' own weights.

The interpreter runs in a process of its own, because Triton decides at import whether it compiles.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

BF16_STEP = 2.0**-8
"""Half the distance of neighbouring bf16 numbers, relative: one correct rounding."""


def nf4_linear(outputs: int, inputs: int, seed: int):
    """A bitsandbytes Linear4bit with double quantisation, whose blocks differ much in size."""
    from bitsandbytes.nn import Linear4bit

    generator = torch.Generator().manual_seed(seed)
    linear = Linear4bit(
        inputs, outputs, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4"
    )
    sizes = torch.rand(outputs, inputs // 64, 1, generator=generator) * 0.2 + 0.01
    weight = torch.randn(outputs, inputs // 64, 64, generator=generator) * sizes
    linear.weight.data = weight.flatten(1).bfloat16()
    return linear.to("cpu")  # which quantises it


def adapted(linear, rank: int, seed: int):
    """The linear with a LoRA adapter of PEFT's whose both halves are random; rank 0 leaves it bare."""
    if not rank:
        return linear
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(seed)
    holder = inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=1.7 * rank, target_modules=["linear"], init_lora_weights=False),
        nn.ModuleDict({"linear": linear}),
    )
    return holder["linear"]


@torch.no_grad()
def exact(linear, x: torch.Tensor) -> torch.Tensor:
    """float64, with the weights and adapters that bf16 kernels see; the thin product is rounded in between, as theirs is."""
    from bitsandbytes.functional import dequantize_4bit

    from lensmith.model.lora import split_linear

    part = split_linear(linear)
    y = x.double() @ dequantize_4bit(part.base.weight.data, part.base.weight.quant_state).double().T
    if part.down is None:
        return y
    thin = (x.double() @ part.down.bfloat16().double().T).bfloat16().double()
    return y + part.scale * thin @ part.up.bfloat16().double().T


def poison(monkeypatch) -> None:
    """Memory that nobody wrote is NaN, so that a number from it shows."""
    new_empty = torch.Tensor.new_empty

    def poisoned(like, *size, **options):
        empty = new_empty(like, *size, **options)
        return empty.fill_(float("nan")) if empty.is_floating_point() else empty

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def few_rows_case(widths, inputs, num_rows, ranks, gated=False, residual=False, tile=None):
    """Runs in the interpreting process: what the kernel gives, twice, and what it should."""
    import triton

    from lensmith.model import few_rows

    assert triton.knobs.runtime.interpret
    if tile is not None:
        tile = few_rows.Tile(**tile)
    linears = [adapted(nf4_linear(n, inputs, i), ranks[i], i) for i, n in enumerate(widths)]
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(num_rows, inputs, generator=generator).bfloat16()
    added = torch.randn(num_rows, widths[0], generator=generator).bfloat16() if residual else None
    prepared = few_rows.FewRows(linears, gated=gated)
    assert prepared.fused
    space = few_rows.workspace(x.device)
    with pytest.MonkeyPatch.context() as patch:
        poison(patch)
        space.parts.fill_(float("nan"))
        first = prepared.run(x, added, tile=tile)
        assert not space.tickets.any(), "a ticket was left for the next launch"
        again = prepared.run(x, added, tile=tile)
    return first, again, [exact(linear, x) for linear in linears], added


ODD = {"columns": 64, "blocks": 2, "programs_per_sm": 1, "warps": 4, "stages": 2}
CASES = {
    "one row, no adapter": ([64], 128, 1, [0]),
    "three linears with adapters, the last step short": ([96, 40, 64], 320, 5, [4, 16, 20]),
    "not all adapted": ([64, 72], 256, 16, [8, 0]),
    "33 rows over a wide tile": ([200, 64, 8], 192, 33, [4, 4, 4]),
    "64 rows": ([130], 512, 64, [16]),
    "large ranks": ([72, 64], 192, 5, [100, 30]),
    "scales of scales in more than one group": ([80], 1024, 8, [16]),
}


@pytest.mark.parametrize("name", CASES)
def test_each_output_is_the_exact_sum_rounded_once(interpreted, name):
    first, again, expected, _ = interpreted(few_rows_case, *CASES[name])
    for ours, once_more, theirs in zip(first, again, expected, strict=True):
        # A sum in fp32 is off by far less than a rounding, except where it cancels.
        assert_close(ours.double(), theirs, rtol=1.01 * BF16_STEP, atol=2e-5 * float(theirs.abs().max()))
        assert torch.equal(ours, once_more)


@pytest.mark.parametrize("sparse", [1, 8])
def test_splitting_the_inputs_changes_no_more_than_the_order_of_a_sum(interpreted, sparse):
    tile = ODD | {"programs_per_sm": sparse}
    (ours,), (again,), (theirs,), _ = interpreted(few_rows_case, [70], 1152, 3, [4], False, False, tile)
    assert_close(ours.double(), theirs, rtol=1.01 * BF16_STEP, atol=2e-5 * float(theirs.abs().max()))
    assert torch.equal(ours, again)


@pytest.mark.parametrize("rank", [0, 16])
def test_a_gated_pair_is_silu_of_the_first_times_the_second(interpreted, rank):
    (ours,), _, (gate, up), _ = interpreted(few_rows_case, [72, 72], 192, 5, [rank, rank], True)
    gate, up = gate.bfloat16().double(), up.bfloat16().double()
    # Three roundings (gate and up may each have gone the other way, silu, the product); each costs half a step.
    assert_close(ours.double(), nn.functional.silu(gate) * up, rtol=8 * BF16_STEP, atol=1e-3)


def test_a_residual_is_added_to_the_rounded_output(interpreted):
    (ours,), _, (theirs,), added = interpreted(few_rows_case, [72], 192, 16, [8], False, True)
    expected = theirs.bfloat16() + added
    off = (ours.double() - expected.double()).abs()
    assert (off <= 2 * BF16_STEP * (theirs.abs() + added.double().abs())).all()
    assert (off == 0).double().mean() > 0.99, "the same two roundings, but for sums at the edge of one"


def weights_case():
    from bitsandbytes.functional import dequantize_4bit

    from lensmith.model.few_rows import project_few

    linear, columns = nf4_linear(200, 192, 0), []
    for start in range(0, 192, 64):
        rows = torch.zeros(64, 192, dtype=torch.bfloat16)
        rows[torch.arange(64), start + torch.arange(64)] = 1
        columns.append(project_few([linear], rows)[0])
    return torch.cat(columns).T, dequantize_4bit(linear.weight.data, linear.weight.quant_state)


def test_rows_of_the_identity_give_the_weights_bit_for_bit(interpreted):
    ours, theirs = interpreted(weights_case)
    assert theirs.dtype is torch.bfloat16
    assert torch.equal(ours, theirs)


def refresh_case():
    from lensmith.model.few_rows import FewRows

    linear = adapted(nf4_linear(64, 128, 0), 4, 0)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    prepared = FewRows([linear])
    with torch.no_grad():
        linear.lora_B["default"].weight.mul_(-3)
    stale = prepared.run(x)[0]
    prepared.refresh()
    return stale, prepared.run(x)[0], exact(linear, x)


def test_refresh_reads_adapters_that_moved(interpreted):
    stale, ours, theirs = interpreted(refresh_case)
    assert_close(ours.double(), theirs, rtol=1.01 * BF16_STEP, atol=2e-5 * float(theirs.abs().max()))
    assert (stale.double() - theirs).abs().max() > 0.1


def test_plain_linears_take_the_ordinary_way():
    from lensmith.model.few_rows import FewRows, project_few

    torch.manual_seed(0)
    linears = [nn.Linear(32, 24, bias=False).bfloat16().requires_grad_(False) for _ in range(2)]
    x = torch.randn(3, 32).bfloat16()
    for ours, linear in zip(project_few(linears, x), linears, strict=True):
        assert_close(ours, linear(x))
    assert_close(FewRows(linears, gated=True).run(x)[0], nn.functional.silu(linears[0](x)) * linears[1](x))
    assert_close(FewRows(linears[:1]).run(x, x[:, :24])[0], linears[0](x) + x[:, :24])


def misfits_case():
    from lensmith.model.few_rows import FewRows

    prepared = FewRows([nf4_linear(64, 128, 0)])
    with pytest.raises(ValueError, match=r"residual of shape \(5, 128\) for 5 rows of 64 outputs"):
        prepared.run(torch.zeros(5, 128, dtype=torch.bfloat16), torch.zeros(5, 128, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"\(5, 64\); these linears read rows of 128 inputs"):
        prepared.run(torch.zeros(5, 64, dtype=torch.bfloat16))


def test_shapes_that_do_not_fit_are_named(interpreted):
    interpreted(misfits_case)


def test_what_one_launch_cannot_take_is_named():
    from lensmith.model.few_rows import FewRows

    with pytest.raises(ValueError, match=r"4 linears .* takes 1 to 3"):
        FewRows([nn.Linear(4, 4)] * 4)
    with pytest.raises(ValueError, match="a residual for 2 linears"):
        FewRows([nn.Linear(4, 4, bias=False)] * 2).run(torch.zeros(1, 4), torch.zeros(1, 4))
