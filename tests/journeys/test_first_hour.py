"""What a newcomer does in the first hour, verb after verb, as the README tells it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from lensmith import cli
from lensmith.config.read import read_config
from lensmith.rundir import RunDir

COLOURS = ("red", "green", "blue", "teal", "brown", "gray", "yellow", "black")
STEPS = 4


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with rows.jsonl: two questions about each of eight pictures."""
    folder = tmp_path_factory.mktemp("first-hour")
    rows = []
    for colour in COLOURS:
        Image.new("RGB", (64, 64), colour).save(folder / f"{colour}.png")
        rows += [
            {"image": f"{colour}.png", "question": q, "answer": colour} for q in ("Which colour?", "Name the colour.")
        ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def lensmith_json(workplace, monkeypatch, capsys):
    """`lensmith_json("train", "run.yaml")` -> the one JSON object on stdout; the verb must succeed."""
    monkeypatch.chdir(workplace)

    def call(*arguments: str) -> dict:
        code = cli.main([*arguments, "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out)

    return call


def test_the_first_hour(lensmith_json, workplace):
    assert lensmith_json("init", "rows.jsonl") == {"wrote": "run.yaml"}
    starter = read_config(Path("run.yaml"))
    assert starter.data.train == str(workplace / "rows.jsonl")

    settings = (
        f"optim.steps={STEPS}",
        "optim.effective_samples=4",
        "data.test=0.25",
        "eval.max_new_tokens=4",
        "data.workers=0",
    )
    trained = lensmith_json("train", "run.yaml", *settings)
    run = RunDir(trained["run"])
    assert (trained["steps"], trained["samples"]) == (STEPS, 4 * STEPS)
    assert trained["before"]["n"] == trained["after"]["n"] == 4
    assert trained["loss"] == run.read_metrics()[-1]["loss"]
    assert [stats["step"] for stats in run.read_metrics()] == list(range(1, STEPS + 1))

    again = lensmith_json("train", str(run.path))
    assert again["samples"] == 0, "all steps were done already"
    assert again["after"] == trained["after"]

    shown = lensmith_json("show", str(run.path))
    assert shown["settings"]["optim.steps"] == STEPS
    assert set(shown["predictions"]) == {"before", "after"}

    scored = lensmith_json("eval", str(run.path))
    assert (scored["before"], scored["after"]) == (trained["before"], trained["after"])
    fresh = lensmith_json("eval", "lensmith/tiny", "rows.jsonl")
    assert fresh["before"] is None
    assert fresh["after"]["n"] == 2 * len(COLOURS)

    assert lensmith_json("ask", str(run.path), "red.png", "Which colour?")["answer"]
