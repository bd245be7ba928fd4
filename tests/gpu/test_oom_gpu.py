"""A real shortage on a real GPU: the run goes on in smaller packs and ends where it would have ended with more memory."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lensmith.config.read import read_config
from lensmith.rundir import RunDir
from lensmith.train.sft import train_model


@pytest.fixture
def rows(tmp_path):
    lines = []
    for number in range(32):
        Image.effect_noise((640, 480), 60 + number).convert("RGB").save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "question": "What?", "answer": "so much noise " * 4}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "rows.jsonl"


def train(rows, run):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    said: list[str] = []
    settings = [
        "optim.steps=3",
        "optim.effective_samples=16",
        "memory.recompute=none",
        "pack.check_packs=0",
        "data.workers=0",
    ]
    config = read_config(
        None, [f"data.train={rows}", f"run={run}", "data.test=null", "precision=fp32", "pack.tokens=8192", *settings]
    )
    train_model(config, say=lambda text: said.append(str(text)))
    return load_file(run / "tuned" / "adapter_model.safetensors"), "\n".join(said)


def test_a_run_that_runs_out_of_memory_goes_on_in_smaller_packs(rows, tmp_path):
    expected, _ = train(rows, tmp_path / "whole")
    enough = torch.cuda.max_memory_reserved()
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction(0.7 * enough / total)
        found, said = train(rows, tmp_path / "short")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    shortages = RunDir(tmp_path / "short").read_oom()
    assert shortages
    assert "is taken again with that pack in two: the same gradient" in said
    # fp32, three steps of AdamW: where a gradient is near zero its rounding decides the direction of a whole step.
    moved = sum(float(value.square().sum()) for name, value in expected.items() if "lora_B" in name) ** 0.5
    off = sum(float((found[n] - v).square().sum()) for n, v in expected.items() if "lora_B" in n) ** 0.5
    assert off < 0.05 * moved
