"""The planner's shapes against transformers' own classes, built on the meta device: every component, exactly."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import torch

from lensmith.model.components import component_of
from lensmith.plan.facts import SIZES, ModelFacts, facts_from_config, read_facts

ENGINE_TABLE = {"2B": 2127.5, "4B": 4437.8, "8B": 8767.1, "32B": 33357.4}
"""Millions of parameters, counted before the planner existed."""


def config_of(facts: ModelFacts) -> Any:
    """The transformers config that these facts are of."""
    from transformers import Qwen3VLConfig, Qwen3VLMoeConfig

    tower, experts = facts.tower, facts.experts
    mixture = (
        {
            "num_experts": experts.count,
            "num_experts_per_tok": experts.used,
            "moe_intermediate_size": experts.width,
        }
        if experts
        else {}
    )
    text = {
        "vocab_size": facts.vocabulary,
        "hidden_size": facts.width,
        "intermediate_size": facts.mlp_width or 6144,
        "num_hidden_layers": facts.layers,
        "num_attention_heads": facts.heads,
        "num_key_value_heads": facts.kv_heads,
        "head_dim": facts.head_width,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
        **mixture,
    }
    vision = {
        "depth": tower.depth,
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_width,
        "num_heads": tower.heads,
        "out_hidden_size": tower.out_width,
        "num_position_embeddings": tower.positions,
        "deepstack_visual_indexes": [5, 11, 17] if tower.depth == 24 else [8, 16, 24],
    }
    kind = Qwen3VLMoeConfig if experts else Qwen3VLConfig
    return kind(text_config=text, vision_config=vision, tie_word_embeddings=facts.tied)


def build(facts: ModelFacts) -> torch.nn.Module:
    from transformers import Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration

    kind = Qwen3VLMoeForConditionalGeneration if facts.experts else Qwen3VLForConditionalGeneration
    with torch.device("meta"):
        model = kind(config_of(facts))
    model.tie_weights()
    return model


@pytest.mark.parametrize("size", SIZES)
def test_every_component_has_the_parameters_of_transformers_model(size):
    facts = SIZES[size]
    counts: Counter[str] = Counter()
    layers: Counter[str] = Counter()
    for name, parameter in build(facts).named_parameters():
        counts[component_of(name)] += parameter.numel()
        if ".layers.0." in name:
            layers["layer"] += parameter.numel()
            layers["linears"] += parameter.numel() if "_proj.weight" in name else 0
        if ".blocks.0." in name:
            layers["block"] += parameter.numel()
    assert counts["language"] == facts.layers * facts.layer + facts.embedding + facts.width
    assert counts["head"] == facts.head
    assert counts["vision"] == facts.tower.num_parameters
    assert counts["merger"] == facts.tower.mergers
    assert counts.total() == facts.num_parameters
    assert layers["layer"] == facts.layer
    assert layers["block"] == facts.tower.block
    assert layers["linears"] == sum(inputs * outputs for inputs, outputs in facts.layer_linears)
    if size in ENGINE_TABLE:
        assert facts.num_parameters / 1e6 == pytest.approx(ENGINE_TABLE[size], abs=0.05)


@pytest.mark.parametrize("size", SIZES)
def test_a_config_json_is_read_to_the_facts_that_ship(size):
    parsed = json.loads(config_of(SIZES[size]).to_json_string(use_diff=False))
    assert facts_from_config(parsed, size) == SIZES[size]


def test_the_tiny_models_folder_is_read_to_its_own_count(build_tiny_checkpoint_count):
    assert read_facts("lensmith/tiny").num_parameters == build_tiny_checkpoint_count


@pytest.fixture
def build_tiny_checkpoint_count() -> int:
    from lensmith.model.load import count_parameters
    from lensmith.model.names import read_architecture

    return count_parameters(read_architecture("lensmith/tiny"))
