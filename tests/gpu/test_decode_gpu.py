"""Rollouts on a GPU: a CUDA graph draws what single launches draw, and training agrees with both.

Layer shapes of Qwen3-VL-8B, 4 layers, NF4 with adapters that change something.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.reference.test_decode import pack_of

from lensmith.config.tree import Tune
from lensmith.model.adapters import prepare_trainable
from lensmith.model.decode import Decoder
from lensmith.model.engine import Engine
from lensmith.model.quant import settle_linears
from lensmith.model.sampling import Sampling
from lensmith.types import Pack

NEW_TOKENS = 150


@pytest.fixture(scope="module")
def engine(tiny_config) -> Any:
    from bitsandbytes.nn import Linear4bit, Params4bit

    config = tiny_config(layers=4, vocab_size=20_000)
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.head_dim = 4096, 12288, 128
    text.num_attention_heads, text.num_key_value_heads = 32, 8
    text.rope_parameters["mrope_section"] = [24, 20, 20]
    text.initializer_range = 0.02
    config.vision_config.out_hidden_size = 4096
    torch.manual_seed(0)
    model = Engine(config).to(torch.bfloat16)
    for layer in model.model.language_model.layers:
        for owner in (layer.self_attn, layer.mlp):
            for name, linear in list(owner.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    stored = Linear4bit(
                        linear.in_features,
                        linear.out_features,
                        bias=False,
                        compute_dtype=torch.bfloat16,
                        quant_type="nf4",
                    )
                    stored.weight = Params4bit(
                        linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
                    )
                    setattr(owner, name, stored)
    model = model.cuda()
    settle_linears(model, torch.bfloat16)
    tuned = prepare_trainable(model, Tune(method="qlora", rank=16), seed=0)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    return model.eval()


@pytest.fixture(scope="module")
def prompts(build_sample) -> list[dict[str, Any]]:
    shapes = [{"images": [(12, 14)], "text": [4, 19]}, {"images": [(5, 6), (7, 3)], "text": [2, 3, 30]}]
    return [build_sample(**shape, learned=1, seed=n, dtype=torch.bfloat16) for n, shape in enumerate(shapes)]


def complete(engine: Any, pack: Pack, members: int, *, graphs: bool, ends: list[int]) -> Any:
    class Eager(Decoder):
        uses_graphs = False  # pyright: ignore[reportAssignmentType]

    decoder = (Decoder if graphs else Eager)(engine, Sampling(), end_ids=ends, never_ids=[290, 291, 292, 293])
    generator = torch.Generator("cuda").manual_seed(3)
    return decoder.complete(pack, members, max_new_tokens=NEW_TOKENS, generator=generator)


@pytest.mark.parametrize("members", [4, 40])
def test_a_graph_draws_what_single_launches_draw(engine, prompts, members):
    """Also where most sequences end early and leave; 40 completions of each prompt are more than the kernel for few rows."""
    pack = pack_of(prompts)
    ends = list(range(1000, 1600))
    with_graphs = complete(engine, pack, members, graphs=True, ends=ends)
    without = complete(engine, pack, members, graphs=False, ends=ends)
    assert with_graphs == without
    assert len({len(c.ids) for group in without for c in group}) > 3


@pytest.mark.parametrize("members", [4, 40])
def test_rollout_and_training_agree_to_bf16(engine, prompts, members):
    gaps = []
    for sample, group in zip(prompts, complete(engine, pack_of(prompts), members, graphs=True, ends=[7]), strict=True):
        for completion in group[:4]:
            with torch.no_grad():
                trained = engine.pack_logprobs(pack_of([sample], [list(completion.ids)]))
            gaps.append((trained.cpu() - torch.tensor(completion.logprobs)).abs().mean().item())
    print(f"mean gap {sum(gaps) / len(gaps):.4f} nats")
    assert max(gaps) < 0.1
