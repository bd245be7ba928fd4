"""Two processes take the steps of one: the same losses and the same adapter, through torchrun and the real command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

COLOURS = ("red", "green", "blue", "yellow", "white", "black")
STEPS = 3


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Eighteen rows of unequal lengths: pictures of several sizes, one row in three without any."""
    folder = tmp_path_factory.mktemp("ranks")
    lines = []
    for number in range(18):
        colour = COLOURS[number % len(COLOURS)]
        row = {"question": "Which colour is it? " * (1 + number % 4), "answer": f"It is {colour}. " * (1 + number % 3)}
        if number % 3:
            Image.new("RGB", (64 + 32 * (number % 3), 64), colour).save(folder / f"{number}.png")
            row["image"] = f"{number}.png"
        lines.append(json.dumps(row))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def train(rows: Path, run: Path, processes: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    launcher = (
        []
        if processes == 1
        else ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-port=29611"]
    )
    settings = [
        f"run={run}",
        "data.test=null",
        f"optim.steps={STEPS}",
        "optim.effective_samples=7",
        "data.columns.image=image",
    ]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "lensmith", "train", str(rows), *settings],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [stats["step"] for stats in metrics] == list(range(1, STEPS + 1))
    return [stats["loss"] for stats in metrics], load_file(run / "tuned" / "adapter_model.safetensors")


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(rows, tmp_path):
    """Slow because three Python processes import torch."""
    losses, adapter = train(rows, tmp_path / "one", 1)
    shared_losses, shared_adapter = train(rows, tmp_path / "two", 2)
    assert shared_losses == pytest.approx(losses, rel=1e-4)
    assert shared_adapter.keys() == adapter.keys()
    for name, weight in adapter.items():
        torch.testing.assert_close(shared_adapter[name], weight, rtol=1e-3, atol=2e-5)
