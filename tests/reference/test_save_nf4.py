"""A checkpoint written in NF4 tensor by tensor is the one that transformers writes, and both load it to the same numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import gpu_suite
from safetensors import safe_open

from lensmith.config.read import read_config
from lensmith.model.load import load_model
from lensmith.model.names import read_architecture, resolve_model
from lensmith.model.quant import quantised_linears, settle_linears
from lensmith.model.stream import FileShards

SETTINGS = ("precision=bf16", "tune.method=qlora")
SMALL_FILE = 200_000
"""Bytes: the tiny model then takes several files."""


@pytest.fixture(scope="module")
def save_nf4():
    sys.path.insert(0, str(Path(gpu_suite.__file__).parent))
    try:
        import save_nf4

        yield save_nf4
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def in_memory():
    """lensmith/tiny quantised while it is loaded."""
    return load_model(read_config(None, SETTINGS)).model


@pytest.fixture(scope="module")
def saved(save_nf4, tmp_path_factory) -> Path:
    folder, tiny = tmp_path_factory.mktemp("nf4"), Path(resolve_model("lensmith/tiny"))
    for file in tiny.iterdir():
        if file.is_file() and file.suffix in (".json", ".jinja"):
            (folder / file.name).write_bytes(file.read_bytes())
    architecture = read_architecture("lensmith/tiny")
    save_nf4.save_nf4(architecture, FileShards(tiny), folder, torch.device("cpu"), file_bytes=SMALL_FILE)
    return folder


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as handle:
            tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  (no mapping)
    return tensors


def answer(model) -> torch.Tensor:
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def test_several_files_hold_what_transformers_writes_of_the_loaded_model(saved, in_memory, tmp_path):
    assert len(list(saved.glob("*.safetensors"))) > 3
    in_memory.save_pretrained(tmp_path)
    ours, theirs = read_all(saved), read_all(tmp_path)
    theirs.pop("lm_head.weight", None)  # tied: written by some versions
    assert ours.keys() - {"lm_head.weight"} == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    config = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitsandbytes"
    assert (config["bnb_4bit_quant_type"], config["bnb_4bit_use_double_quant"]) == ("nf4", True)


def test_a_ready_made_checkpoint_gives_the_logits_of_the_one_in_memory_bit_for_bit(saved, in_memory):
    loaded = load_model(read_config(None, [f"model={saved}", *SETTINGS]))
    assert any("stored in 4 bits already" in said for said in loaded.sentences)
    assert quantised_linears(loaded.model) == quantised_linears(in_memory)
    assert torch.equal(answer(loaded.model), answer(in_memory))


def test_stock_transformers_loads_it(saved, in_memory):
    from transformers import Qwen3VLForConditionalGeneration

    stock = Qwen3VLForConditionalGeneration.from_pretrained(saved, dtype=torch.bfloat16, attn_implementation="sdpa")
    weight = stock.model.language_model.layers[0].mlp.up_proj.weight
    assert weight.quant_state.quant_type == "nf4"
    assert torch.equal(weight.data, in_memory.model.language_model.layers[0].mlp.up_proj.weight.data)
    # On processors with AVX512-BF16 bitsandbytes would repack the weights, with scales rounded to bf16.
    settle_linears(stock, torch.bfloat16)
    assert torch.equal(answer(stock.eval()), answer(in_memory))
