"""The examples run as their READMEs say, in small: rows are drawn, trained on and asked about, by the settings that ship."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from lensmith import cli
from lensmith.config.read import read_config

EXAMPLES = Path(__file__).parents[2] / "examples"
QUICK = (
    "optim.steps=2", "optim.effective_samples=8", "data.workers=0", "eval.max_new_tokens=4", "eval.samples=4",
)  # fmt: skip


@pytest.fixture
def example(tmp_path, monkeypatch, capsys):
    """`example("latex-ocr", "--train", "16")` draws rows in a copy of it; the value trains with it: `train("run.yaml")`."""

    def draw(name: str, *counts: str):
        folder = tmp_path / name
        shutil.copytree(EXAMPLES / name, folder)
        monkeypatch.chdir(folder)
        subprocess.run([sys.executable, "make_data.py", "rows", *counts], check=True, capture_output=True)

        def train(settings: str, *overrides: str) -> dict:
            code = cli.main(["train", settings, *overrides, *QUICK, "--json"])
            out, err = capsys.readouterr()
            assert code == 0, err
            return json.loads(out)

        return train

    return draw


def rows_of(file: str) -> list[dict]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def test_formulas_become_latex(example):
    train = example("latex-ocr", "--train", "24", "--test", "4")
    train_rows, test_rows = rows_of("rows/train.jsonl"), rows_of("rows/test.jsonl")
    assert (len(train_rows), len(test_rows)) == (24, 4)
    assert not {row["answer"] for row in train_rows} & {row["answer"] for row in test_rows}
    assert Image.open(Path("rows") / train_rows[0]["image"]).size == (192, 64)
    told = train("run.yaml")
    assert told["steps"] == 2
    assert told["after"]["n"] == 4
    assert told["after"]["metric"] == "exact"


def test_pictures_are_counted_from_rewards(example):
    train = example("visual-math-grpo", "--form", "16", "--train", "8", "--test", "4")
    for row in rows_of("rows/test.jsonl"):
        assert re.fullmatch(r"\\boxed\{[0-8]\}", row["answer"])
    assert train("form.yaml")["steps"] == 2
    told = train("run.yaml", "grpo.max_new_tokens=6", "grpo.group=4")
    assert told["steps"] == 2
    assert told["after"]["metric"] == "boxed"
    first = json.loads(Path("runs/visual-math/metrics.jsonl").read_text().splitlines()[0])
    assert set(first["rewards"]) == {"math_boxed", "format", "length"}


def test_the_same_seed_draws_the_same_rows(example, tmp_path):
    example("latex-ocr", "--train", "3", "--test", "2")
    first = {path.name: path.read_bytes() for path in Path("rows").rglob("*") if path.is_file()}
    subprocess.run([sys.executable, "make_data.py", "again", "--train", "3", "--test", "2"], check=True)
    assert {path.name: path.read_bytes() for path in Path("again").rglob("*") if path.is_file()} == first


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_settings_that_ship_are_read(file):
    assert read_config(file).model == "lensmith/tiny"


@pytest.mark.parametrize("name", ["latex-ocr", "visual-math-grpo"])
def test_commands_for_a_real_model_name_settings_that_hold_together(name, monkeypatch):
    monkeypatch.chdir(EXAMPLES / name)
    page = (EXAMPLES / name / "README.md").read_text()
    commands = [
        line
        for line in page.replace("\\\n", " ").splitlines()
        if re.match(r"\$ lensmith (plan|train) run.yaml .*8B", line)
    ]
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(command.removeprefix("$ "))[3:]
        overrides = [word for word in words if re.match(r"[a-z_.]+=", word)]
        assert read_config(Path("run.yaml"), overrides).model == "Qwen/Qwen3-VL-8B-Instruct"
