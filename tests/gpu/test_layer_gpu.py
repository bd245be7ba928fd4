"""On a GPU in bf16 a layer as one step is as exact as step by step, needs no more memory and far less of the host's time."""

from __future__ import annotations

import functools
import time
from statistics import median
from typing import Any

import pytest
import torch
from test_engine_gpu import gradients, laid_end_to_end, relative, samples, wide_config  # noqa: F401

from lensmith.config.tree import Tune
from lensmith.model import kernels
from lensmith.model.adapters import prepare_trainable
from lensmith.model.engine import Engine, run_layer
from lensmith.model.recompute import Waiting, recomputed
from lensmith.types import Pack, Segment

GPU = torch.device("cuda", 0)

NOT_WORSE = 1.15
"""One way's error over the other's: they round at other places, neither may be worse by system."""
MEMORY_SLACK = 0.01
RANK = 16
TOKENS = 1000


def adapted(model: Engine, method: Any = "lora") -> Any:
    """LoRA on all linears of the decoder, the same in every type of the model, B not zero."""
    tuned = prepare_trainable(model, Tune(method=method, rank=RANK), seed=0)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data = (0.02 * torch.randn(parameter.shape, generator=generator)).to(parameter)
    return tuned.train()


def with_branches(model: Any, sample: dict[str, Any], cut: int) -> Pack:
    """The sample's first `cut` tokens, shared by its own end and by the same words in reverse."""
    whole = laid_end_to_end(model, [sample])
    ids, labels, places = whole.input_ids, whole.labels, whole.positions
    end = len(ids) - cut
    return Pack(
        torch.cat([ids, ids[cut:].flip(0)]),
        torch.cat([labels, labels[cut:]]),
        torch.cat([places, places[:, cut:]], dim=1),
        (Segment(0, cut), Segment(cut, end, 0), Segment(cut + end, end, 0)),
        whole.pixels,
        whole.grids,
        tuple("abc"),
    )


def run(tuned: Any, pack: Pack) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logprobs = tuned(pack=pack)
    (-logprobs.mean()).backward()
    return logprobs.detach(), gradients(tuned)


DRAWS = 6


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("recompute", ["none", "layers"])
def test_one_step_is_as_close_to_fp32_as_step_by_step(wide_config, samples, recompute, shared):  # noqa: F811
    """Over several draws of weights: the log-probability errors of one, of sixty words, differ by a third by chance."""
    draws = [errors_of_both(wide_config, samples, recompute, shared, seed) for seed in range(DRAWS)]
    for which, name in enumerate(("gradient error", "log-probability rms")):
        step, one = (sum(errors[fused][which] ** 2 for errors in draws) ** 0.5 for fused in (False, True))
        each = " ".join(f"{errors[True][which] / errors[False][which]:.2f}" for errors in draws)
        print(f"{name}: step by step {step:.4f}, one step {one:.4f}; their ratio draw by draw {each}")
        assert one <= NOT_WORSE * step


def errors_of_both(config, samples, recompute, shared, seed) -> dict[bool, tuple[float, float]]:  # noqa: F811
    """By whether layers are one step: relative error of all gradients, and the log-probabilities' rms error."""

    def build(dtype: torch.dtype) -> tuple[Engine, Any]:
        torch.manual_seed(seed)
        model: Any = Engine(config)
        model.to(GPU, dtype)
        model.recompute = recompute
        return model, adapted(model)

    exact, truth = build(torch.float32)
    exact.fused_layers = False
    pack = with_branches(exact, samples[3], cut=500) if shared else laid_end_to_end(exact, samples)
    logprobs, wanted = run(truth, pack)
    model, tuned = build(torch.bfloat16)
    errors = {}
    for fused in (False, True):
        model.fused_layers = fused
        found, ours = run(tuned, pack)
        errors[fused] = relative(ours, wanted), float((found - logprobs).square().mean().sqrt())
    assert len(model._fused._made) == len(model.model.language_model.layers) - 1
    # Two passes of the same way: what is used again (buffers, shadows, stacks) is as it was.
    assert relative(run(tuned, pack)[1], ours) < 0.5 * errors[True][0]
    return errors


def test_each_small_step_is_its_autograd_function():
    generator = torch.Generator(GPU).manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=GPU).bfloat16()  # noqa: E731
    norm: Any = torch.nn.Module()
    norm.weight, norm.variance_epsilon = torch.nn.Parameter(draw(128), requires_grad=False), 1e-6
    for heads in (8, 1):
        x, back = draw(300, heads, 128).requires_grad_(), draw(300, heads, 128)
        (theirs,) = torch.autograd.grad(expected := kernels.rms_norm(norm, x), x, back)
        found, scale = kernels.rms_forward(x.detach(), norm.weight, norm.variance_epsilon)
        assert torch.equal(found, expected)
        assert torch.equal(kernels.rms_backward(back.clone(), x.detach(), norm.weight, scale), theirs)
    query, key = draw(300, 8, 128), draw(300, 2, 128)
    angle = torch.rand(300, 64, device=GPU)
    rope = (torch.cat([angle.cos()] * 2, -1).bfloat16(), torch.cat([angle.sin()] * 2, -1).bfloat16())
    leaves = [query.clone().requires_grad_(), key.clone().requires_grad_()]
    expected = kernels.rotate(leaves[0] * 1, leaves[1] * 1, rope, None)
    backs = (draw(300, 8, 128), draw(300, 2, 128))
    theirs = torch.autograd.grad(expected, leaves, [part.clone() for part in backs])
    for ours, wanted in zip(kernels.rotate_forward(query.clone(), key.clone(), rope), expected, strict=True):
        assert torch.equal(ours, wanted)
    for ours, wanted in zip(kernels.rotate_backward(backs[0], backs[1], rope), theirs, strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("heads", [(32, 8), (16, 8), (20, 3)])
def test_norm_and_rotation_in_one_launch_err_no_more_than_in_three(heads):
    generator = torch.Generator(GPU).manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=GPU).bfloat16()  # noqa: E731
    angle = torch.rand(300, 64, device=GPU) * 6
    rope = (torch.cat([angle.cos()] * 2, -1).bfloat16(), torch.cat([angle.sin()] * 2, -1).bfloat16())
    query, key, _ = draw(300, heads[0] + 2 * heads[1], 128).split([*heads, heads[1]], dim=1)
    grads, weights = [draw(300, count, 128) for count in heads], [1 + 0.3 * draw(128) for _ in heads]
    wide = [part.double().requires_grad_() for part in (query, key)]
    exact = []
    for x, weight in zip(wide, weights, strict=True):
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight.double()
        first, second = normed.chunk(2, -1)
        cos, sin = (part.double()[:, None] for part in rope)
        exact.append(normed * cos + torch.cat([-second, first], -1) * sin)
    exact += torch.autograd.grad(exact, wide, [grad.double() for grad in grads])
    scaled = [kernels.rms_forward(x.contiguous(), w, 1e-6) for x, w in zip((query, key), weights, strict=True)]
    three = [*kernels.rotate_forward(scaled[0][0], scaled[1][0], rope)]
    back = kernels.rotate_backward(grads[0].clone(), grads[1].clone(), rope)
    for grad, x, weight, (_, scale) in zip(back, (query, key), weights, scaled, strict=True):
        three.append(kernels.rms_backward(grad, x.contiguous(), weight, scale))
    norms = (weights[0], 1e-6), (weights[1], 1e-6)
    assert kernels._heads_kernel_agrees(query.device, query.dtype)
    *one, scales = kernels.norm_rotate_forward(query, key, *norms, rope)
    assert isinstance(scales, torch.Tensor), "the kernels take bf16 heads of width 128"
    one += kernels.norm_rotate_backward(grads[0], grads[1], query, key, scales, weights[0], weights[1], rope)
    for ours, theirs, wanted in zip(one, three, (part.detach() for part in exact), strict=True):
        errors = [float((part.double() - wanted).norm() / wanted.norm()) for part in (ours, theirs)]
        print(f"heads {heads}: relative error in one launch {errors[0]:.2e}, in three {errors[1]:.2e}")
        # Where both round at the same places they differ by chance in the last digit.
        assert errors[0] <= 1.01 * errors[1]


@pytest.fixture(scope="module")
def eight_b(tiny_config) -> Any:
    """Four layers of 8B's shape and a small vocabulary."""
    config = tiny_config(layers=4)
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.head_dim = 4096, 12288, 128
    text.num_attention_heads, text.num_key_value_heads = 32, 8
    text.rope_parameters["mrope_section"] = [24, 20, 20]
    config.vision_config.out_hidden_size = 4096
    return config


def build_8b(config: Any, method: str) -> Engine:
    with torch.device(GPU):
        torch.manual_seed(0)
        model = Engine(config).bfloat16()
    if method == "qlora":
        from bitsandbytes.nn.modules import Linear4bit, Params4bit

        for layer in model.model.language_model.layers:
            for owner in (layer.self_attn, layer.mlp):
                for name, linear in list(owner.named_children()):
                    if not isinstance(linear, torch.nn.Linear):
                        continue
                    narrow = Linear4bit(
                        linear.in_features,
                        linear.out_features,
                        bias=False,
                        compute_dtype=torch.bfloat16,
                        quant_type="nf4",
                    )
                    narrow.weight = Params4bit(
                        linear.weight.data.cpu(),
                        quant_type="nf4",  # pyright: ignore[reportCallIssue]
                        requires_grad=False,
                    )
                    setattr(owner, name, narrow.to(GPU))
    return model


def text_pack(tokens: int) -> Pack:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 280, (tokens,), generator=generator)
    labels = torch.full_like(ids, -100)
    labels[-50:] = ids[-50:]
    places = torch.arange(tokens).expand(4, -1).contiguous()
    empty = torch.empty(0, 1536), torch.empty(0, 3, dtype=torch.int64)
    return Pack(ids, labels, places, (Segment(0, tokens),), *empty, ("a",))


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("recompute", ["none", "layers"])
def test_one_step_needs_no_more_memory(eight_b, method, recompute):
    model = build_8b(eight_b, method)
    model.recompute = recompute
    tuned, pack = adapted(model, method), text_pack(4 * TOKENS).pin_memory()
    peaks = {}
    for fused in (False, True):
        model.fused_layers = fused
        run(tuned, pack)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(tuned, pack)
        peaks[fused] = torch.cuda.max_memory_allocated() - before
    print(
        f"{method}, recompute {recompute}: step by step {peaks[False] / 2**20:.0f} MiB, one step {peaks[True] / 2**20:.0f}"
    )
    assert peaks[True] <= peaks[False] * (1 + MEMORY_SLACK)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_one_step_takes_less_of_the_hosts_time(eight_b, method):
    """Forward and backward pass of a row of layers, as far as the host is concerned: nothing waits for the GPU in between."""
    model = build_8b(eight_b, method)
    adapted(model, method)
    if model.shadows is not None:
        model.shadows.refresh()
    decoder, pack, row = model.model.language_model, text_pack(TOKENS), 8
    layout = model._route(pack).layout
    start = torch.randn(TOKENS, 4096, device=GPU).bfloat16()
    rope = tuple(part[0] for part in decoder.rotary_emb(start[None], pack.positions[1:, None].to(GPU)))

    def forward(fused: bool) -> torch.Tensor:
        hidden, waiting = start.clone().requires_grad_(), Waiting(None)
        for index in [0, 1, 2] * (row // 3):
            layer = decoder.layers[index]
            if fused:
                found = model._fused.find(index, layer, model.shadows)
                assert found is not None
                hidden = found.run(hidden, rope, layout, waiting)
            else:
                step = functools.partial(_step, layer, rope, layout)
                hidden = recomputed(step, hidden, waiting, keeps_random=False)
        return hidden

    ms: dict[bool, list[float]] = {}
    for fused in (False, True):
        times: list[tuple[float, float]] = []
        for _ in range(12):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            out = forward(fused)
            between = time.perf_counter()
            loss = out.float().sum()
            torch.cuda.synchronize()
            again = time.perf_counter()
            loss.backward()
            times.append((between - begun, time.perf_counter() - again))
        ms[fused] = [1000 * median(column) / (row // 3 * 3) for column in zip(*times[2:], strict=True)]
        how = "one step" if fused else "step by step"
        forth, back = ms[fused]
        print(f"{method}, {TOKENS} tokens, {how}: {forth:.2f} ms of host time per layer forward, {back:.2f} backward")
    assert sum(ms[True]) < 0.6 * sum(ms[False])  # the aim is a third


def _step(layer: Any, rope: Any, layout: Any, hidden: torch.Tensor, direction: str) -> torch.Tensor:
    return run_layer(layer, hidden, rope, layout, None)
