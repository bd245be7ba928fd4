"""On a GPU: weights and layer inputs that come and go on streams of their own give the numbers of those that stay.

A copy that overtakes the work before it, or work that does not wait for a copy, would show here as a large difference in
one of many passes. Both sides run the same kernels on the same numbers; only the head is read in other pieces.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_engine_gpu import gradients, laid_end_to_end, relative, samples, wide_config  # noqa: F401  fixtures

from lensmith.config.tree import Memory, Tune
from lensmith.model.adapters import prepare_trainable
from lensmith.model.engine import Engine
from lensmith.model.residence import settle_weights
from lensmith.train.rounded import RoundedAdamW

GPU = torch.device("cuda")
PASSES = 20

PLACES = {
    "inputs": Memory(recompute="layers", offload="inputs"),
    "layers": Memory(recompute="layers", stream_layers=8),
    "all": Memory(recompute=6, offload="inputs", embedding="host", head="host", tower="host", stream_layers=5),
}


def build(wide_config, memory):  # noqa: F811
    torch.manual_seed(0)
    model = Engine(wide_config).to(GPU, torch.bfloat16).eval()
    settle_weights(model, memory, GPU)
    tuned = prepare_trainable(model, Tune(rank=4), seed=1)
    generator = torch.Generator(GPU).manual_seed(2)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=generator)
    return tuned


@pytest.mark.parametrize("name", PLACES)
def test_what_comes_and_goes_computes_what_stays(wide_config, samples, name):  # noqa: F811
    plain, moved = build(wide_config, Memory(recompute="none")), build(wide_config, PLACES[name])
    stock = Engine(wide_config)
    pack = laid_end_to_end(stock, samples).pin_memory()
    expected = plain(pack=pack)
    expected.sum().backward()
    theirs = gradients(plain)
    for _ in range(PASSES):
        found = moved(pack=pack)
        found.sum().backward()
        ours = gradients(moved)
        assert (found - expected).abs().max() < 1e-3
        assert relative(ours, theirs) < 2e-3


@pytest.mark.parametrize("states", ["fp32", "8bit", "paged_8bit"])
def test_a_step_inside_the_backward_pass_is_the_step_after_it(wide_config, samples, states):  # noqa: F811
    pack = laid_end_to_end(Engine(wide_config), samples).pin_memory()
    ends, start = [], None
    for in_backward in (False, True):
        torch.manual_seed(0)
        model = Engine(wide_config).to(GPU, torch.bfloat16).train()
        model.recompute = "layers"
        start = start or {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]
        optimizer = RoundedAdamW(groups, lr=1e-3, states=states, rounding="nearest", in_backward=in_backward)
        for _ in range(3):
            model(pack=pack).sum().neg().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    after, inside = ends
    # Gradients add up in no fixed order on a GPU, and where one is near zero AdamW turns that noise into a whole step, and
    # 8 bits into a coarser one. A weight updated too early or twice would differ by as much as it moved.
    assert relative(inside, after) < 0.25 * relative(after, start)


def test_adapters_beside_four_bits_are_the_modules_of_peft(samples, wide_config):  # noqa: F811
    """The same NF4 weights through our one step of the graph and through PEFT's modules, against PEFT in fp32."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    from lensmith.model.lora import project

    torch.manual_seed(0)
    base = Linear4bit(512, 1536, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    base.weight = Params4bit(torch.randn(1536, 512).bfloat16() * 0.05, quant_type="nf4", requires_grad=False)
    layer = torch.nn.ModuleDict({"up_proj": base.cuda()})
    tuned = get_peft_model(layer, LoraConfig(r=8, target_modules=["up_proj"], init_lora_weights=False))  # type: ignore[arg-type]
    linear = tuned.base_model.model["up_proj"].float()
    x = torch.randn(300, 512, device=GPU)
    weights = [linear.lora_A["default"].weight, linear.lora_B["default"].weight]
    back = torch.randn(300, 1536, device=GPU)

    def run(forward, dtype):
        given = x.to(dtype).requires_grad_()
        return torch.autograd.grad(forward(given), [given, *weights], back.to(dtype))

    truth = run(linear, torch.float32)
    ours = run(lambda given: project((linear,), given)[0], torch.bfloat16)
    for found, wanted in zip(ours, truth, strict=True):
        assert (found.float() - wanted).norm() / wanted.norm() < 0.01  # bf16: 2^-9 per rounding, a few of them


def test_one_kernel_widens_nf4_bit_for_bit_as_bitsandbytes_does():
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from lensmith.model.nf4 import can_widen, widen

    for shape in [(1024, 512), (96, 4096), (12288, 4096), (64, 64), (40, 24)]:
        weight = torch.randn(shape, device=GPU, dtype=torch.bfloat16) * 0.03
        packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        assert can_widen(state)
        assert torch.equal(widen(packed, state, torch.empty_like(weight)), dequantize_4bit(packed, state))


def test_our_8_bit_states_are_those_of_bitsandbytes():
    from bitsandbytes.optim import AdamW8bit

    ends = []
    for make in (
        lambda p: RoundedAdamW([{"params": [p]}], lr=1e-3, states="8bit"),
        lambda p: AdamW8bit([p], lr=1e-3, weight_decay=0.0),
    ):
        generator = torch.Generator(GPU).manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(300, 512, device=GPU, generator=generator))
        optimizer = make(parameter)
        for _ in range(5):
            parameter.grad = torch.randn(300, 512, device=GPU, generator=generator)
            optimizer.step()
        ends.append(parameter.detach().clone())
    assert torch.equal(ends[0], ends[1])
