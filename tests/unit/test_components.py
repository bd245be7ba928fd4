"""Components by name, on stock models and under PEFT, and what is counted and grouped by them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from rich.console import Console

from lensmith.config.tree import Optim, Tune
from lensmith.errors import ModelError
from lensmith.model.adapters import prepare_trainable
from lensmith.model.components import (
    COMPONENTS,
    DEFAULT_LEARNING_RATES,
    TOWER_COST,
    census_table,
    component_of,
    gradient_norms,
    learning_rates,
    num_parameters,
    parameter_groups,
    plain_name,
    precision_of,
    take_census,
    tower_warning,
    untouched_sentences,
)

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
TUNE = Tune(rank=4, language="adapted", vision="trained", merger="adapted")


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("model.visual.patch_embed.proj.weight", "vision"),
        ("model.visual.blocks.3.attn.qkv.bias", "vision"),
        ("model.visual.merger.linear_fc1.weight", "merger"),
        ("model.visual.deepstack_merger_list.2.norm.weight", "merger"),
        ("model.language_model.embed_tokens.weight", "language"),
        ("lm_head.weight", "head"),
        ("lm_head", "head"),
        ("base_model.model.model.visual.merger.linear_fc2.lora_A.default.weight", "merger"),
        ("base_model.model.model.language_model.layers.0.mlp.up_proj.base_layer.weight", "language"),
    ],
)
def test_every_name_has_one_component_with_or_without_peft(name, component):
    assert component_of(name) == component


def test_a_name_of_another_model_is_answered_with_the_parts():
    with pytest.raises(ModelError, match=r"transformer\.h\.0: not a part of a Qwen3-VL, whose parts are model\.visual"):
        component_of("transformer.h.0")


def test_all_four_components_are_found_in_a_stock_model(build_tiny):
    assert {component_of(name) for name, _ in build_tiny().named_parameters()} == set(COMPONENTS)


def test_plain_names_are_the_names_before_peft(build_tiny):
    before = {name for name, _ in build_tiny().named_parameters()}
    tuned = prepare_trainable(build_tiny(), TUNE, seed=0)
    assert {plain_name(name) for name, _ in tuned.named_parameters() if ".lora_" not in name} == before


def test_census_counts_every_parameter_once(build_tiny):
    bare = build_tiny()
    tuned = prepare_trainable(build_tiny(), TUNE, seed=0)
    rows = {row.component: row for row in take_census(tuned)}
    assert sum(row.parameters for row in rows.values()) == sum(p.numel() for p in tuned.parameters())
    assert sum(row.trainable for row in rows.values()) == sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    assert rows["vision"].parameters == sum(
        p.numel() for name, p in bare.named_parameters() if component_of(name) == "vision"
    )
    assert rows["vision"].trainable == rows["vision"].parameters
    assert (rows["vision"].adapted, rows["merger"].adapted, rows["language"].adapted) == (0, 2 * 4, 4 * 7)
    assert rows["head"].trainable == 0


def test_census_says_that_a_tied_head_belongs_to_the_embedding(build_tiny):
    rows = take_census(build_tiny(tied=True))
    head = next(row for row in rows if row.component == "head")
    assert (head.modules, head.parameters, head.precision) == (0, 0, "")
    console = Console(width=120)
    with console.capture() as screen:
        console.print(census_table(rows))
    assert "tied to language" in screen.get()


def test_four_bit_weights_count_by_what_they_stand_for():
    packed = torch.zeros(32, 1, dtype=torch.uint8)
    packed.quant_state = SimpleNamespace(shape=torch.Size((8, 8)), quant_type="nf4")
    assert (num_parameters(packed), precision_of(packed)) == (64, "nf4")


def test_gradient_norms_are_those_of_the_concatenated_gradients(build_tiny, build_sample, stock_loss):
    tuned = prepare_trainable(build_tiny(), TUNE, seed=0)
    stock_loss(tuned, [build_sample()]).backward()
    norms = gradient_norms(tuned)
    assert list(norms) == ["vision", "merger", "language"]
    for component, norm in norms.items():
        gradients = [
            p.grad.flatten()
            for name, p in tuned.named_parameters()
            if p.grad is not None and component_of(name) == component
        ]
        assert norm == pytest.approx(torch.cat(gradients).norm().item(), rel=1e-12)
        assert norm > 0
    assert untouched_sentences(norms) == []


def test_a_component_without_gradient_is_named(build_tiny, build_sample, stock_loss):
    """Samples without images leave tower and mergers untouched."""
    tuned = prepare_trainable(build_tiny(), TUNE, seed=0)
    stock_loss(tuned, [build_sample(images=[], text=[9])]).backward()
    sentences = untouched_sentences(gradient_norms(tuned))
    assert [sentence.split()[6] for sentence in sentences] == ["vision", "merger"]
    assert "does any sample of this step hold an image?" in sentences[0]
    assert "tune.vision=frozen" in sentences[0]


def test_parameter_groups_hold_each_trainable_parameter_once(build_tiny):
    tuned = prepare_trainable(build_tiny(), TUNE, seed=0)
    groups = parameter_groups(tuned, Optim(weight_decay=0.1), "lora")
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in tuned.parameters() if p.requires_grad}
    torch.optim.AdamW(groups)


def test_norms_and_biases_do_not_decay(build_tiny):
    groups = parameter_groups(prepare_trainable(build_tiny(), TUNE, seed=0), Optim(weight_decay=0.1), "lora")
    for group in groups:
        dims = {p.dim() > 1 for p in group["params"]}
        assert dims == {group["weight_decay"] == 0.1}


def test_each_component_has_its_own_learning_rate(build_tiny):
    tuned = prepare_trainable(build_tiny(), TUNE, seed=0)

    def rates(optim, method="lora"):
        return {group["component"]: group["lr"] for group in parameter_groups(tuned, optim, method)}

    default = DEFAULT_LEARNING_RATES["lora"]
    assert rates(Optim()) == {"vision": pytest.approx(default / 10), "merger": default, "language": default}
    assert rates(Optim(), "full")["language"] == DEFAULT_LEARNING_RATES["full"]
    assert rates(Optim(learning_rate=1e-3, vision_learning_rate=3e-6, merger_learning_rate=4e-4)) == {
        "vision": 3e-6,
        "merger": 4e-4,
        "language": 1e-3,
    }


def test_every_method_has_a_learning_rate_of_its_own_accord():
    methods = get_args(Tune.model_fields["method"].annotation)
    assert len(methods) == 4
    assert all(learning_rates(Optim(), method)["language"] > 0 for method in methods)


def test_the_warning_of_a_tower_that_trains_says_what_was_measured():
    cases = json.loads((RESULTS / "memory-grid.json").read_text(encoding="utf-8"))["cases"]
    of = {" ".join(case["settings"]): case for case in cases if case["size"] == "8b" and case["tokens"] == 4096}
    plain = of["tune.method=qlora"]
    settings = {"adapted": "tune.vision=adapted", "trained": "tune.vision=trained tune.merger=trained"}
    for state, more in settings.items():
        found = tuple(of[f"tune.method=qlora {more}"][key] / plain[key] - 1 for key in ("peak_gib", "step_s"))
        assert TOWER_COST[state] == pytest.approx(found, abs=0.005)
    assert "11% more memory and 56% longer steps" in tower_warning("adapted")
