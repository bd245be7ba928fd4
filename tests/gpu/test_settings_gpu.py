"""On a GPU: settings whose code differs there train, and those that only save memory or time change no loss."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit
from PIL import Image

from lensmith.config.read import read_config
from lensmith.rundir import RunDir
from lensmith.train.sft import train_model

ROWS, STEPS = 16, 24
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 230), "white": (240, 240, 240)}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """16 pictures of one of four colours, with the question which."""
    folder, lines = tmp_path_factory.mktemp("rows"), []
    for number in range(ROWS):
        name = list(COLOURS)[number % len(COLOURS)]
        Image.new("RGB", (64 + 32 * (number % 5), 96), COLOURS[name]).save(folder / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "question": "Which colour?", "answer": name}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"


def losses(rows: Path, run: Path, *settings: str) -> list[float]:
    """Loss of each step of a run on lensmith/tiny."""
    common = [
        f"data.train={rows}",
        f"run={run}",
        "data.test=null",
        "data.workers=0",
        "pack.check_packs=0",
        f"optim.steps={STEPS}",
        "optim.effective_samples=8",
        "optim.learning_rate=2e-3",
    ]
    train_model(read_config(None, [*common, *settings]), say=lambda text: None)
    lines = RunDir(run).metrics_path.read_text().splitlines()
    found = [json.loads(line)["loss"] for line in lines]
    assert len(found) == STEPS
    assert all(map(math.isfinite, found))
    return found


@pytest.mark.parametrize("method", ["lora_8bit", "qlora"])
def test_adapters_beside_few_bits_learn_what_those_beside_16_learn(rows, tmp_path, method):
    wide = losses(rows, tmp_path / "lora", "tune.method=lora", "precision=bf16")
    narrow = losses(rows, tmp_path / method, f"tune.method={method}", "precision=bf16")
    # The tiny model knows colours, so the question is whether few bits start near and go down as far.
    assert narrow[0] == pytest.approx(wide[0], abs=0.3)
    assert min(narrow[-4:]) < 0.5 * narrow[0] or max(wide[0], narrow[0]) < 0.05
    assert sum(narrow[-4:]) / 4 == pytest.approx(sum(wide[-4:]) / 4, abs=0.1)


def test_features_that_are_kept_over_epochs_give_the_losses_of_a_tower_that_looks_each_time(rows, tmp_path):
    settings = ("precision=fp32", "memory.recompute=none")
    looked = losses(rows, tmp_path / "looked", *settings)
    kept = losses(rows, tmp_path / "kept", *settings, "memory.vision_cache_gib=0.1")
    on_disk = losses(
        rows,
        tmp_path / "disk",
        *settings,
        "memory.vision_cache_gib=0.1",
        f"memory.vision_cache_dir={tmp_path / 'store'}",
    )
    # fp32 with TF32 off; gradients add up in no fixed order, which 24 steps of AdamW enlarge.
    assert kept == pytest.approx(looked, rel=1e-3, abs=1e-4)
    assert on_disk == pytest.approx(looked, rel=1e-3, abs=1e-4)
    assert any((tmp_path / "store").rglob("*"))


def test_paged_states_are_paged_and_step_as_those_on_the_gpu_do():
    ends = []
    for kind in (AdamW8bit, PagedAdamW8bit):
        generator = torch.Generator("cuda").manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(1024, 512, device="cuda", generator=generator))
        optimizer = kind([parameter], lr=1e-3)
        for _ in range(6):
            parameter.grad = torch.randn(1024, 512, device="cuda", generator=generator)
            optimizer.step()
        torch.cuda.synchronize()
        ends.append(parameter.detach().clone())
        # bitsandbytes pages states from 100,000 numbers on
        assert getattr(optimizer.state[parameter]["state1"], "is_paged", False) is (kind is PagedAdamW8bit)
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    "settings", [("tune.method=qlora", "tune.rank=64"), ("tune.method=full", "memory.recompute=layers")]
)
def test_a_run_with_paged_states_has_the_losses_of_one_without(rows, tmp_path, settings):
    common = (*settings, "precision=bf16", "optim.learning_rate=1e-4", "optim.rounding=nearest")
    common = common if "tune.method=full" in settings else common[:-1]
    plain = losses(rows, tmp_path / "plain", *common, "optim.name=adamw_8bit")
    paged = losses(rows, tmp_path / "paged", *common, "optim.name=paged_adamw_8bit")
    assert paged == pytest.approx(plain, rel=0.05, abs=0.02)
