"""On a GPU with Unsloth: one config, two engines, the same rows; what comes out is evaluated, verified and resumed alike.

Each run is a program of its own, because Unsloth rewrites the libraries that the other tests use.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors import safe_open

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("unsloth") is None,
    reason="Unsloth is not installed here (extra unsloth); what can be known without it is in tests/unit/test_unsloth.py",
)

STEPS = 60
COLOURS = ("red", "green", "blue", "yellow", "black", "white")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("colours")
    lines = []
    for number in range(48):
        colour, side = COLOURS[number % len(COLOURS)], 64 + 32 * (number % 3)
        Image.new("RGB", (side, 64), colour).save(folder / f"{number}.png")
        words = "What colour is this?" if number % 2 else "Which colour do you see in this picture?"
        lines.append(json.dumps({"image": f"{number}.png", "question": words, "answer": f"It is {colour}."}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "rows.jsonl"


def lensmith(*arguments: str) -> dict[str, Any]:
    """What the verb's --json says."""
    command = [sys.executable, "-m", "lensmith", *arguments, "--json"]
    # Unsloth compiles for a minute and a half, which changes its speed and not what it computes.
    environment = os.environ | {"UNSLOTH_COMPILE_DISABLE": "1"}
    # What it says goes to the terminal, so that one that is stopped has been heard.
    ended = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, timeout=300, env=environment)
    assert ended.returncode == 0, ended.stdout[-4000:]
    return json.loads(ended.stdout)


def train(rows: Path, run: Path, engine: str, *overrides: str) -> dict[str, Any]:
    settings = ("model=lensmith/tiny", "tune.method=qlora", "optim.name=adamw", "optim.learning_rate=2e-3")
    settings += ("data.test=0.25", f"optim.steps={STEPS}", "optim.effective_samples=12", "seed=3", f"run={run}")
    settings += ("pack.share_prefix=false",)  # groups of rows come in another order
    return lensmith("train", str(rows), *settings, f"engine={engine}", *overrides)


@pytest.fixture(scope="module")
def trained(rows, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("runs")
    return {engine: train(rows, folder / engine, engine) for engine in ("lensmith", "unsloth")}


def losses(run: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def test_both_engines_learn_the_same_from_the_same_config(trained):
    ours, theirs = (losses(trained[engine]["run"]) for engine in ("lensmith", "unsloth"))
    assert len(ours) == len(theirs) == STEPS
    # The first loss has seen no step: the same rows, pixels, labels and normalisation, rounded to bf16 in other places.
    assert theirs[0] == pytest.approx(ours[0], rel=0.02)
    assert ours[-1] < ours[0] / 3
    assert theirs[-1] < theirs[0] / 3
    before, after = (trained["unsloth"][name]["value"] for name in ("before", "after"))
    assert after > before


def test_both_engines_adapt_the_same_linears(trained):
    def names(engine: str) -> set[str]:
        with safe_open(Path(trained[engine]["run"]) / "tuned" / "adapter_model.safetensors", "pt") as opened:
            return set(opened.keys())

    assert names("lensmith") == names("unsloth")


def test_what_unsloth_trained_is_verified_by_the_same_checks(trained):
    verdict = lensmith("verify", trained["unsloth"]["run"])
    assert verdict["ok"], verdict


def test_a_run_of_unsloths_goes_on_from_its_checkpoint(trained):
    run = trained["unsloth"]["run"]
    again = lensmith("train", run, f"optim.steps={STEPS + 2}")
    assert again["steps"] == STEPS + 2
    assert losses(run)[-1] < losses(run)[0] / 3
