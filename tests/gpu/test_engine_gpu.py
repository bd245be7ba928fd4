"""On a GPU in bf16 the engine is as close to fp32 as transformers' own forward is, loss and gradients.

The layer shapes are those of the real models: head width 128 (72 in the tower), grouped KV heads, deepstack.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from lensmith.model.attention import varlen_available
from lensmith.model.engine import Engine
from lensmith.types import Pack, Segment

NOT_WORSE = 1.15
"""Our error over stock's: two bf16 paths round differently, neither may be systematically worse."""


@pytest.fixture(scope="module")
def wide_config(tiny_config) -> Any:
    config = tiny_config(layers=8)
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.head_dim = 512, 1536, 128
    text.num_attention_heads, text.num_key_value_heads, text.initializer_range = 8, 2, 0.05
    text.rope_parameters["mrope_section"] = [24, 20, 20]
    vision.hidden_size, vision.num_heads, vision.intermediate_size = 288, 4, 512
    vision.out_hidden_size, vision.initializer_range = 512, 0.05
    return config


@pytest.fixture(scope="module")
def samples(build_sample) -> list[dict[str, Any]]:
    shapes = [([(12, 16)], [5, 40]), ([(8, 8), (6, 10)], [4, 3, 30]), ([], [50]), ([(20, 24)], [7, 25])]
    return [
        build_sample(images=images, text=text, learned=15, seed=seed, dtype=torch.float32)
        for seed, (images, text) in enumerate(shapes)
    ]


def laid_end_to_end(model: Any, samples: list[dict[str, Any]]) -> Pack:
    segments, places, start = [], [], 0
    for sample in samples:
        ids = sample["input_ids"]
        rope, _ = model.model.get_rope_index(
            ids[None], mm_token_type_ids=sample["mm_token_type_ids"][None], image_grid_thw=sample["image_grid_thw"]
        )
        places.append(torch.cat([torch.arange(len(ids))[None], rope[:, 0].cpu()]))
        segments.append(Segment(start, len(ids)))
        start += len(ids)
    pictures = [s for s in samples if s["pixel_values"] is not None]
    return Pack(
        torch.cat([s["input_ids"] for s in samples]),
        torch.cat([s["labels"] for s in samples]),
        torch.cat(places, dim=1),
        tuple(segments),
        torch.cat([s["pixel_values"] for s in pictures]),
        torch.cat([s["image_grid_thw"] for s in pictures]),
        tuple("abcd"),
    )


def on_gpu(sample: dict[str, Any]) -> dict[str, Any]:
    return {key: value.cuda() if value is not None else None for key, value in sample.items()}


def relative(ours: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == truth.keys()
    off = sum(float((ours[n].float() - g).square().sum()) for n, g in truth.items())
    return (off / sum(float(g.square().sum()) for g in truth.values())) ** 0.5


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("recompute", ["none", "layers"])
def test_bf16_packs_are_as_close_to_fp32_as_stock_is(wide_config, samples, stock_loss, recompute):
    torch.manual_seed(0)
    truth = Engine(wide_config).cuda().float().train()
    assert varlen_available(torch.device("cuda", 0), torch.bfloat16)
    expected = stock_loss(truth, [on_gpu(s) for s in samples])
    expected.backward()
    exact = gradients(truth)
    model = copy.deepcopy(truth).bfloat16()
    model.recompute = recompute
    theirs = stock_loss(model, [on_gpu(s) for s in samples])
    theirs.backward()
    stock_error = relative(gradients(model), exact)
    pack = laid_end_to_end(model, samples)
    logprobs = model(pack=pack)
    ours = -logprobs.sum() / len(logprobs)
    ours.backward()
    our_error = relative(gradients(model), exact)
    print(f"loss: fp32 {expected:.5f}, stock bf16 {theirs:.5f}, packed {ours:.5f}")
    print(f"gradient error: stock {stock_error:.4f}, packed {our_error:.4f}")
    assert our_error <= NOT_WORSE * stock_error
    assert abs(float(ours - expected)) <= max(2 * abs(float(theirs - expected)), 2e-3)


def test_fp32_on_the_gpu_uses_the_padded_form_and_agrees(wide_config, samples, stock_loss):
    torch.manual_seed(0)
    model = Engine(wide_config).cuda().float().train()
    expected = stock_loss(model, [on_gpu(s) for s in samples])
    logprobs = model(pack=laid_end_to_end(model, samples))
    torch.testing.assert_close(-logprobs.mean(), expected, rtol=1e-4, atol=1e-4)
