"""On a GPU, with random weights of the true shapes: `plan --measure` finds what was planned, and NF4 survives the disk."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lensmith.config.read import read_config
from lensmith.config.tree import RunConfig
from lensmith.model.load import load_model
from lensmith.model.names import read_architecture, resolve_model
from lensmith.plan.facts import SIZES, ModelFacts

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PLANNED_WITHIN = 0.15
"""Of the measured peak: models of a few layers, where gaps of the allocator weigh more than in whole ones."""
WORDS = 2048
"""Of the vocabulary that is asked about: the tiny tokenizer's."""


@pytest.fixture(scope="module")
def scripts():
    """The benchmarks that find their neighbours beside themselves."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import random_weights
        import save_nf4

        yield {"random_weights": random_weights, "save_nf4": save_nf4}
    finally:
        sys.path.remove(str(BENCHMARKS))


def write_shell(facts: ModelFacts, layers: int, folder: Path) -> Path:
    """config.json of these shapes with fewer layers; tokenizer and processor are lensmith/tiny's."""
    from transformers import Qwen3VLConfig

    folder.mkdir(parents=True, exist_ok=True)
    for file in Path(resolve_model("lensmith/tiny")).iterdir():
        if file.suffix in (".json", ".jinja") and file.name not in ("training.json", "generation_config.json"):
            shutil.copy(file, folder)
    marks: Any = read_architecture("lensmith/tiny")
    tower = facts.tower
    config = Qwen3VLConfig(
        tie_word_embeddings=facts.tied,
        text_config={
            "hidden_size": facts.width,
            "num_hidden_layers": layers,
            "num_attention_heads": facts.heads,
            "num_key_value_heads": facts.kv_heads,
            "head_dim": facts.head_width,
            "intermediate_size": facts.mlp_width,
            "vocab_size": facts.vocabulary,
            "tie_word_embeddings": facts.tied,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": tower.depth,
            "hidden_size": tower.width,
            "intermediate_size": tower.mlp_width,
            "num_heads": tower.heads,
            "out_hidden_size": tower.out_width,
            "num_position_embeddings": tower.positions,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        **{
            name: getattr(marks, name)
            for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        },
    )
    config.save_pretrained(folder)
    return folder


def plan(folder: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "lensmith", "plan", "--model", str(folder), "--measure", "--json", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "GiB reserved where" in ended.stderr
    return json.loads(ended.stdout)


GRPO = ("--task", "grpo", "--group", "8", "--completion-tokens", "256", "--images", "1", "--image-tokens", "1024")


@pytest.mark.parametrize("method", ["qlora", "lora", "lora_8bit"])
@pytest.mark.parametrize("pack", [("--images", "4", "--image-tokens", "700"), GRPO])
def test_a_pack_reserves_what_was_planned_for_it(scripts, tmp_path, method, pack):
    folder = write_shell(SIZES["2B"], 8, tmp_path / "model")
    scripts["random_weights"].write_weights(read_architecture(str(folder)), folder)
    told = plan(folder, "--method", method, "--pack-tokens", "4096", *pack)
    training = max(gib for moment, gib in told["moments"].items() if moment not in ("rollout", "scoring"))
    print(f"{method}: planned {training:.2f} GiB, {told['step_s']:.2f} s; measured {told['measured']}")
    assert told["measured"]["peak_gib"] == pytest.approx(training, rel=PLANNED_WITHIN)
    assert told["measured"]["step_s"] > 0


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(20, 148, device="cuda")[None]
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[..., :WORDS].cpu()


def loaded_logits(config: RunConfig, **more: Any) -> torch.Tensor:
    found = logits(load_model(config, **more).model)
    gc.collect()
    torch.cuda.empty_cache()
    return found


@pytest.mark.parametrize(("size", "layers"), [("2B", 28), ("32B", 8), pytest.param("32B", 64, marks=pytest.mark.slow)])
def test_a_checkpoint_saved_in_nf4_has_the_logits_of_the_model_in_memory_bit_for_bit(scripts, tmp_path, size, layers):
    """The whole 32B is slow: 67 GB are drawn twice, 20 GB written and read again."""
    shell, saved = (write_shell(SIZES[size], layers, tmp_path / name) for name in ("shell", "saved"))
    shards = scripts["random_weights"].RandomShards(read_architecture(str(shell)), torch.device("cuda"))
    in_memory = loaded_logits(read_config(None, [f"model={shell}", "tune.method=qlora"]), shards=shards)
    scripts["save_nf4"].save_nf4(read_architecture(str(shell)), shards, saved, torch.device("cuda"))
    assert in_memory.std() > 0
    assert torch.equal(loaded_logits(read_config(None, [f"model={saved}", "tune.method=qlora"])), in_memory)
