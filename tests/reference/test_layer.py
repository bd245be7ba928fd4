"""The layer as one step of the graph is the layer step by step: losses, every gradient, whatever is adapted or moved.

In float64 on the tiny model; the step-by-step path itself is compared with transformers in test_engine.py.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_engine import gradients, join
from test_quant import QLORA, load_for
from torch.testing import assert_close

from lensmith.config.tree import Memory, Tune
from lensmith.model import attention, cascade, flash
from lensmith.model import engine as engine_module
from lensmith.model.adapters import prepare_trainable
from lensmith.model.engine import Engine
from lensmith.model.kernels import (
    rms_backward,
    rms_forward,
    rotate_backward,
    rotate_forward,
    swiglu_backward,
    swiglu_forward,
)
from lensmith.model.layer import FusedLayers, fuse
from lensmith.model.lora import Shadows
from lensmith.model.residence import settle_weights

pytestmark = pytest.mark.usefixtures("float64_modules")
CPU = torch.device("cpu")
LAYERS = 4
ALL, ATTENTION, MLP = "[qkvo]_proj|gate_proj|up_proj|down_proj", "[qkvo]_proj", "gate_proj|up_proj|down_proj"


@pytest.fixture
def samples(build_sample):
    return [
        build_sample(images=[(2, 3), (4, 2)], text=[5, 4, 9], learned=6, seed=1),
        build_sample(images=[], text=[17], learned=8, seed=2),
        build_sample(images=[(3, 5)], text=[3, 12], learned=5, seed=3),
    ]


@pytest.fixture
def pack(build_tiny, samples):
    return join(build_tiny(), samples, [(0, 0, None), (1, 0, None), (2, 0, None)])


def adapted(model, names=ALL, **options):
    """LoRA whose B is not zero, on the decoder's linears with these names."""
    target = rf".*language_model.*\.({names})"
    tuned = get_peft_model(model, LoraConfig(r=3, lora_alpha=7, target_modules=target, **options))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return tuned


def engine(tuned: Any) -> Engine:
    found = tuned.base_model.model
    assert isinstance(found, Engine)
    return found


def fused_layers(model: Engine) -> dict[int, Any]:
    return model._fused._made


def run(tuned, *packs):
    """Log-probabilities, and the gradients of an uneven sum of them, added up over the packs."""
    found = []
    for pack in packs:
        logprobs = tuned(pack=pack)
        (logprobs * torch.linspace(0.5, 2, len(logprobs), dtype=logprobs.dtype)).sum().backward()
        found.append(logprobs.detach())
    return found, gradients(tuned)


def check_same(tuned, *packs, fused: int, expected_gradients: int, **tolerance):
    """Both ways through one model."""
    model = engine(tuned)
    model.fused_layers = False
    theirs, their_grads = run(tuned, *packs)
    model.fused_layers = True
    ours, our_grads = run(tuned, *packs)
    assert len(fused_layers(model)) == fused
    assert_close(ours, theirs, **tolerance)
    assert our_grads.keys() == their_grads.keys()
    assert len(our_grads) == expected_gradients
    for name, grad in their_grads.items():
        assert grad.abs().max() > 0, name
        assert_close(our_grads[name], grad, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("recompute", ["none", "layers", 2])
def test_one_step_is_the_layer_step_by_step(build_tiny, pack, recompute):
    tuned = adapted(build_tiny(cls=Engine))
    engine(tuned).recompute = recompute
    check_same(tuned, pack, fused=LAYERS - 1, expected_gradients=LAYERS * 7 * 2)


def with_branches(model, build_sample):
    """An image with two ends, and a sample of its own."""
    first = build_sample(images=[(4, 3)], text=[5, 11], learned=4, seed=5)
    prefix = 5 + 12 + 2
    words = build_sample(images=[], text=[9], learned=9, seed=6)
    other = {
        name: torch.cat([first[name][:prefix], words[name]]) for name in ("input_ids", "labels", "mm_token_type_ids")
    }
    other |= {"pixel_values": first["pixel_values"], "image_grid_thw": first["image_grid_thw"]}
    alone = build_sample(images=[(2, 2)], text=[3, 8], learned=5, seed=8)
    return join(model, [first, other, alone], [(0, 0, None), (0, prefix, 0), (1, prefix, 0), (2, 0, None)])


@pytest.mark.parametrize("recompute", ["none", "layers"])
def test_a_shared_prefix_with_branches_is_the_same_in_one_step(build_tiny, build_sample, recompute):
    tuned = adapted(build_tiny(cls=Engine))
    engine(tuned).recompute = recompute
    pack = with_branches(engine(tuned), build_sample)
    check_same(tuned, pack, fused=LAYERS - 1, expected_gradients=LAYERS * 7 * 2)


def kernel_forward(query, key, value, cu_q, cu_k, max_q, max_k, dropout, causal, *debug, scale, **window):
    """In the place of aten's flash kernel."""
    assert (dropout, window["window_size_left"]) == (0.0, -1)
    assert window["window_size_right"] == (0 if causal else -1)
    out, lse, _ = flash.plain_forward(query, key, value, flash.Spans(causal, cu_q, cu_k, max_q, max_k), scale)
    return out, lse, torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)


def kernel_backward(grad, query, key, value, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, *random, scale, **_):
    assert [len(part) for part in random] == [2, 0]
    assert lse.is_contiguous()
    spans = flash.Spans(causal, cu_q, cu_k, max_q, max_k)
    return flash.plain_backward(grad, (query, key, value), out, lse, (), spans, scale)


@pytest.mark.parametrize(("form", "kind"), [("concatenated", flash.Varlen), ("cascade", cascade.Cascade)])
@pytest.mark.parametrize("recompute", ["none", "layers"])
def test_the_flash_kernels_are_called_for_what_the_padded_form_computes(
    build_tiny, build_sample, monkeypatch, recompute, form, kind
):
    """With a stand-in for the kernels themselves: arguments, shared keys and their gradients are ours."""
    tuned = adapted(build_tiny(cls=Engine))
    model = engine(tuned)
    model.recompute = recompute
    pack = with_branches(model, build_sample)
    expected, their_grads = run(tuned, pack)
    for module in (attention, cascade):
        monkeypatch.setattr(module, "varlen_available", lambda device, dtype: True)
    monkeypatch.setattr(engine_module, "build_layout", functools.partial(attention.build_layout, form=form))
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", kernel_forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", kernel_backward)
    route = model._route(pack)
    assert isinstance(route.layout, kind)
    assert isinstance(route.last_layout, kind)
    found, our_grads = run(tuned, pack)
    assert_close(found, expected)
    assert_close(our_grads, their_grads)
    check_same(tuned, pack, fused=LAYERS - 1, expected_gradients=LAYERS * 7 * 2)


@pytest.mark.parametrize(
    ("names", "per_layer"), [(ATTENTION, 4), (MLP, 3), ("q_proj|v_proj", 2), ("k_proj|up_proj", 2), ("down_proj", 1)]
)
@pytest.mark.parametrize("recompute", ["none", "layers"])
def test_any_subset_of_the_linears_may_be_adapted(build_tiny, pack, names, per_layer, recompute):
    tuned = adapted(build_tiny(cls=Engine), names)
    engine(tuned).recompute = recompute
    check_same(tuned, pack, fused=LAYERS - 1, expected_gradients=LAYERS * per_layer * 2)


def test_adapters_may_differ_in_rank_and_scale(build_tiny, pack):
    tuned = adapted(build_tiny(cls=Engine), rank_pattern={"k_proj": 5, "up_proj": 1}, alpha_pattern={"q_proj": 2})
    check_same(tuned, pack, fused=LAYERS - 1, expected_gradients=LAYERS * 7 * 2)


@pytest.mark.parametrize("recompute", ["none", "layers"])
def test_a_tower_that_trains_gets_its_gradient_through_the_layers(build_tiny, pack, recompute):
    for names, adapters in ((ALL, LAYERS * 7 * 2), ("q_proj", LAYERS * 2)):
        tuned = adapted(build_tiny(cls=Engine), names)
        model = engine(tuned)
        model.recompute = recompute
        tower = [parameter.requires_grad_() for parameter in model.model.visual.parameters()]
        check_same(tuned, pack, fused=LAYERS - 1, expected_gradients=adapters + len(tower))


def test_a_frozen_decoder_passes_the_towers_gradient_on(build_tiny, pack):
    for recompute in ("none", "layers"):
        tuned = adapted(build_tiny(cls=Engine))
        model = engine(tuned)
        model.recompute = recompute
        with tuned.disable_adapter():
            tuned.requires_grad_(False)
            tower = [parameter.requires_grad_() for parameter in model.model.visual.parameters()]
            check_same(tuned, pack, fused=LAYERS - 1, expected_gradients=len(tower))


def test_gradients_add_up_over_two_packs(build_tiny, samples, pack):
    tuned = adapted(build_tiny(cls=Engine))
    other = join(engine(tuned), samples, [(2, 0, None), (1, 0, None)])
    check_same(tuned, pack, other, fused=LAYERS - 1, expected_gradients=LAYERS * 7 * 2)


def test_what_is_remembered_of_a_layer_follows_its_adapters(build_tiny, pack):
    """Off and on, another adapter, merged, a scale, an adapter put in the place of another: each with layers already made."""
    tuned = adapted(build_tiny(cls=Engine))
    tuned.add_adapter("other", LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|down_proj)"))
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.double().add_(0.03)
    model = engine(tuned)

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        found = []
        for model.fused_layers in (True, False):
            with torch.no_grad():
                found.append(tuned(pack=pack))
        assert len(fused_layers(model)) in (0, LAYERS - 1)
        assert_close(*found)
        return tuple(found)

    linear = model.model.language_model.layers[1].self_attn.q_proj
    ways = [both()[0]]
    with tuned.disable_adapter():
        ways.append(both()[0])
    assert_close(both()[0], ways[0])
    linear.scaling["default"] *= 2
    ways.append(both()[0])
    tuned.merge_adapter()
    merged = both()[0]
    tuned.unmerge_adapter()
    assert_close(merged, ways[-1])
    linear.lora_B["default"] = torch.nn.Linear(3, 64, bias=False, dtype=torch.float64)
    ways.append(both()[0])
    tuned.set_adapter("other")
    ways.append(both()[0])
    for number, way in enumerate(ways):
        assert all((way - other).abs().max() > 1e-4 for other in ways[:number])


def test_layers_wrapped_after_the_first_pass_are_found(build_tiny, pack):
    model = build_tiny(cls=Engine).requires_grad_(False)
    with torch.no_grad():
        before = model(pack=pack)
    assert len(fused_layers(model)) == LAYERS - 1
    tuned = adapted(model)
    with torch.no_grad():
        assert (tuned(pack=pack) - before).abs().max() > 1e-4
    check_same(tuned, pack, fused=LAYERS - 1, expected_gradients=LAYERS * 7 * 2)


@pytest.mark.parametrize(
    "memory",
    [
        Memory(recompute="layers", offload="inputs"),
        Memory(recompute="layers", stream_layers=4),
        Memory(recompute="layers", offload="inputs", stream_layers=2, embedding="host", tower="host"),
    ],
)
def test_places_in_host_memory_do_not_matter(build_tiny, pack, memory):
    model = build_tiny(cls=Engine)
    settle_weights(model, memory, CPU)
    tuned = adapted(model)
    check_same(tuned, pack, fused=LAYERS - 1, expected_gradients=LAYERS * 7 * 2)
    check_same(tuned, pack, fused=LAYERS - 1, expected_gradients=LAYERS * 7 * 2)


@pytest.mark.parametrize("recompute", ["none", "layers"])
def test_four_bit_layers_are_the_same_in_one_step(build_tiny, samples, tmp_path, recompute):
    """fp32 on the CPU; the weights are the same, only the order of sums differs."""
    build_tiny(dtype=torch.float32, cls=Engine).save_pretrained(tmp_path)
    model = load_engine(tmp_path)
    tuned = prepare_trainable(model, QLORA, seed=0)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    engine(tuned).recompute = recompute
    pack = join(model, samples, [(0, 0, None), (1, 0, None), (2, 0, None)])
    check_same(tuned, pack, fused=LAYERS - 1, expected_gradients=LAYERS * 7 * 2, rtol=1e-3, atol=1e-4)


def load_engine(folder):
    import test_quant

    before, test_quant.Qwen3VLForConditionalGeneration = test_quant.Qwen3VLForConditionalGeneration, Engine
    try:
        return load_for(folder, QLORA)
    finally:
        test_quant.Qwen3VLForConditionalGeneration = before


def test_in_16_bits_the_step_is_no_further_from_float64_than_step_by_step(build_tiny, samples):
    """bf16 with fp32 adapters and their shadows, as on a GPU."""
    exact = prepare(build_tiny(cls=Engine))
    pack = join(engine(exact), samples, [(0, 0, None), (1, 0, None), (2, 0, None)])
    _, truth = run(exact, pack)
    rounded = prepare(build_tiny(cls=Engine, dtype=torch.bfloat16))
    errors = []
    for engine(rounded).fused_layers in (True, False):
        _, found = run(rounded, pack)
        off = sum(float((found[name].double() - grad).square().sum()) for name, grad in truth.items())
        errors.append((off / sum(float(grad.square().sum()) for grad in truth.values())) ** 0.5)
    ours, theirs = errors
    print(f"gradient error in bf16: one step {ours:.4f}, step by step {theirs:.4f}")
    assert ours <= 1.15 * theirs  # both round at other places; neither may be worse by system


def prepare(model):
    """Adapters equal in any type of the model."""
    tuned = prepare_trainable(model, Tune(rank=4), seed=0)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data = (0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    return tuned


def test_stacked_shadows_follow_the_adapters(build_tiny, pack):
    tuned = prepare(build_tiny(cls=Engine, dtype=torch.bfloat16))
    model = engine(tuned)
    with torch.no_grad():
        before = tuned(pack=pack)
        for name, parameter in tuned.named_parameters():
            if "lora_A" in name:
                parameter.mul_(-1)
        after = tuned(pack=pack)
        model.fused_layers = False
        expected = tuned(pack=pack)
    moved = (before - expected).abs().max()
    assert (after - expected).abs().max() < 0.1 * moved
    fused = fused_layers(model)[0]
    down = model.model.language_model.layers[0].self_attn.k_proj.lora_A["default"].weight
    assert torch.equal(fused._qkv._stacked[4:8], down.bfloat16())
    assert down.shadow.data_ptr() == fused._qkv._stacked[4:8].data_ptr()


def test_layers_made_in_inference_mode_can_train_afterwards(build_tiny, pack):
    tuned = prepare(build_tiny(cls=Engine, dtype=torch.bfloat16))
    with torch.inference_mode():
        tuned(pack=pack)
    assert len(run(tuned, pack)[1]) == LAYERS * 7 * 2


def test_a_new_shadow_takes_the_place_it_has_in_a_stack():
    layer = torch.nn.ModuleDict({"a": torch.nn.Linear(6, 4), "b": torch.nn.Linear(6, 4)})
    tuned = get_peft_model(layer, LoraConfig(r=2, target_modules=["a", "b"]))  # type: ignore[arg-type]
    shadows = Shadows(tuned, torch.bfloat16)
    shadows.refresh()
    inner: Any = tuned.base_model.model
    downs = [inner[name].lora_A["default"].weight for name in "ab"]
    stacked = shadows.stack(downs)
    with torch.no_grad():
        downs[1].fill_(3)
    shadows.refresh()
    assert torch.equal(stacked, torch.cat(downs).bfloat16())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda layer: layer.input_layernorm.requires_grad_(), "a norm that trains"),
        (lambda layer: layer.mlp.up_proj.requires_grad_(), "a linear that trains"),
        (lambda layer: setattr(layer.mlp, "down_proj", torch.nn.Linear(160, 64)), "a bias"),
    ],
)
def test_layers_of_another_kind_go_step_by_step(build_tiny, change, why):
    layer = build_tiny(cls=Engine).requires_grad_(False).model.language_model.layers[0]
    assert fuse(layer, None) is not None
    change(layer)
    assert fuse(layer, None) is None, why


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_dropout_and_dora_go_step_by_step(build_tiny, options):
    tuned = adapted(build_tiny(cls=Engine), **options)
    assert fuse(engine(tuned).model.language_model.layers[0], None) is None


def test_a_layer_without_gradients_keeps_nothing(build_tiny, pack):
    tuned = adapted(build_tiny(cls=Engine))
    for context in (torch.no_grad(), nullcontext()):
        with context:
            made = tuned(pack=pack)
        assert made.requires_grad == isinstance(context, nullcontext)
    assert isinstance(FusedLayers().__reduce__()[0](), FusedLayers)


def test_each_small_step_has_the_gradient_of_autograd():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, weight, back = draw(7, 3, 8).requires_grad_(), draw(8), draw(7, 3, 8)
    normed, scale = rms_forward(x, weight, 1e-6)
    expected = torch.nn.functional.rms_norm(x, (8,), weight, 1e-6)
    assert_close(normed, expected)
    (theirs,) = torch.autograd.grad(expected, x, back)
    assert_close(rms_backward(back.clone(), x.detach(), weight, scale.detach()), theirs)

    angle = draw(7, 4)
    rope = (torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin())
    key = draw(7, 2, 8).requires_grad_()
    backs = (back, draw(7, 2, 8))
    theirs = torch.autograd.grad(rotate_forward(x, key, rope), (x, key), backs)
    for ours, grad in zip(rotate_backward(backs[0].clone(), backs[1].clone(), rope), theirs, strict=True):
        assert_close(ours, grad)

    gate, up, back = draw(5, 9).requires_grad_(), draw(5, 9).requires_grad_(), draw(5, 9)
    theirs = torch.autograd.grad(swiglu_forward(gate, up), (gate, up), back)
    for ours, grad in zip(swiglu_backward(back, gate.detach(), up.detach()), theirs, strict=True):
        assert_close(ours, grad)
