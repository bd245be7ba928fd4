"""A GRPO run that falls: its page, its best checkpoint, and the way back that is offered."""

import json

import numpy as np
import pytest
from PIL import Image

from lensmith import cli
from lensmith.rundir import RunDir

SETTINGS = [
    "task=grpo", "grpo.rewards=[judge.py:falls]", "grpo.group=4", "grpo.max_new_tokens=6", "optim.effective_samples=8",
    "save.every_steps=6", "save.keep=1", "data.test=0.25", "data.workers=0", "model=lensmith/tiny",
]  # fmt: skip
JUDGE = """
from itertools import count
calls = count()
def falls(completion, answer, **columns):
    call = next(calls)
    if call == 100:
        raise ValueError("no judge today")
    return call % 4 / 4 + (call < 48)
"""


@pytest.fixture(scope="module")
def fallen(tmp_path_factory):
    """Twelve steps of 8 completions; the reward falls by 1 after the sixth, where a checkpoint is."""
    place = tmp_path_factory.mktemp("grpo")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(16):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(place / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": "What colour is it?", "answer": ["red", "blue"][number % 2]})
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (place / "judge.py").write_text(JUDGE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert cli.main(["train", "rows.jsonl", *SETTINGS, "optim.steps=13", "run=r"]) == 0
    return place


def test_the_run_leaves_its_page_at_rest_with_every_step(fallen):
    run = RunDir(fallen / "r")
    html = run.page_path.read_text()
    assert "http-equiv" not in html
    assert html.count('<section class="step"') == 13
    assert html.count("data:image/jpeg") == 26
    assert "13 of 13" in html
    assert "failed for 1 completion " in html
    assert len(run.completions_path.read_text().splitlines()) == 13 * 8


def test_the_best_checkpoint_is_kept_and_can_be_asked_and_gone_on_from(fallen, monkeypatch, capsys):
    monkeypatch.chdir(fallen)
    run = RunDir("r")
    assert [path.name for path in run.list_checkpoints()] == ["step-000006", "step-000013"]
    best = run.checkpoint_path(6)
    assert cli.main(["eval", str(best), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["predictions"] == "r/predictions-step-000006.jsonl"
    assert cli.main(["ask", str(best), "0.png", "What colour is it?", "--json"]) == 0
    again = [
        "train",
        str(run.config_path),
        f"tune.start_from={best}",
        "run=r-from-6",
        "optim.steps=1",
        "data.test=null",
    ]
    assert cli.main(again) == 0
    assert RunDir("r-from-6").page_path.exists()


def test_a_finished_run_that_is_started_again_says_the_same_and_keeps_its_page(fallen, monkeypatch, capsys):
    monkeypatch.chdir(fallen)
    before = RunDir("r").page_path.read_text()
    assert cli.main(["train", "r"]) == 0
    told = capsys.readouterr().err
    assert "All 13 steps are done already." in told
    assert "those before step 6 had 1.375" in told
    assert "tune.start_from=r/checkpoints/step-000006 run=r-from-6" in told
    assert RunDir("r").page_path.read_text() == before
