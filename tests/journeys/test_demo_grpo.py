"""The demo of GRPO from drawing to page, a few steps long; what it teaches in full is in benchmarks/results/demo-grpo.json."""

import hashlib
import json
import random
import re

import numpy as np
import pytest
from PIL import Image

from lensmith.cli import main
from lensmith.config.read import read_config
from lensmith.demo_grpo import GrpoDemoResult, Judged, run_grpo_demo
from lensmith.demo_sums import HEIGHT_PX, LARGEST, MODEST, PARTS, QUESTION, WIDTH_PX, draw_sum, write_sums
from lensmith.evals.predict import Prediction, read_predictions

NUM_SUMS = {"test": 30, "warm-up": 40, "train": 24}
WARM_UP_STEPS, GRPO_STEPS = 2, 2


@pytest.fixture(scope="module")
def said():
    return []


@pytest.fixture(scope="module")
def result(tmp_path_factory, said):
    run = tmp_path_factory.mktemp("demo") / "run"
    return run_grpo_demo(run=run, say=said.append, steps=(WARM_UP_STEPS, GRPO_STEPS), num_sums=NUM_SUMS)


def test_demo_ends_with_rewards_accuracies_time_and_folder(result):
    told = json.loads(json.dumps(result.to_json()))
    assert list(told) == ["before", "after", "train_s", "run"]
    assert list(told["before"]) == list(told["after"]) == ["reward", "accuracy"]
    assert -1 <= told["before"]["reward"] <= 1
    assert told["train_s"] > 0


def test_grpo_goes_on_from_the_warm_up_and_knows_no_reward_but_math_boxed(result):
    warm_up, grpo = (read_config(folder / "config.yaml") for folder in (result.run / "warm-up", result.run))
    assert (warm_up.task, grpo.task) == ("sft", "grpo")
    assert grpo.tune.start_from == str(result.run / "warm-up")
    assert grpo.grpo.rewards == ["math_boxed"]
    assert str(grpo.data.train) != str(warm_up.data.train)
    before, after = (read_predictions(result.run / f"predictions-{when}.jsonl") for when in ("before", "after"))
    assert len(before) == len(after) == NUM_SUMS["test"]
    assert {p.where.split(":")[0] for p in before} == {"test.jsonl"}


def test_demo_leaves_completions_curve_and_page(result):
    lines = [json.loads(line) for line in (result.run / "completions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {line["step"] for line in lines} == {1, GRPO_STEPS}
    assert {line["where"].split(":")[0] for line in lines} == {"train.jsonl"}
    with Image.open(result.run / "reward.png") as curve:
        assert curve.size == (1280, 640)
    page = result.page.read_text(encoding="utf-8")
    assert len(re.findall(r'<img src="data:image/png', page)) >= 1 + 24
    assert "<h2>Reward</h2>" in page
    assert "supervised warm-up" in page
    assert "reward -" in page


def test_demo_says_that_before_is_after_the_warm_up(result, said):
    text = "\n".join(map(str, said))
    assert f"Before GRPO, after the warm-up: {result.before}" in text
    assert f"answers before and after: {result.page}" in text


def test_rewards_and_accuracy_are_of_the_box_alone():
    answers = ["\\boxed{8}", "It is \\boxed{8}.", "\\boxed{7}", "8"]
    predictions = tuple(Prediction("test.jsonl:1", QUESTION, "\\boxed{8}", answer, 7, True) for answer in answers)
    judged = Judged(predictions, (1.0, 1.0, -0.5, -1.0))
    assert judged.right == [True, True, False, False]
    assert judged.to_json() == {"reward": 0.125, "accuracy": 0.5}
    assert judged.accuracy([0, 2]).value == 0.5


def test_no_picture_is_in_two_parts_and_a_seed_draws_the_same(tmp_path):
    counts = {"test": 60, "warm-up": 80, "train": 100}
    drawn = {}
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        files = write_sums(tmp_path / name, seed, counts)
        for part in PARTS:
            rows = [json.loads(line) for line in files[part].read_text(encoding="utf-8").splitlines()]
            assert len(rows) == counts[part]
            pixels = [np.asarray(Image.open(tmp_path / name / row["image"])).tobytes() for row in rows]
            drawn[name, part] = [hashlib.sha256(one).hexdigest() for one in pixels]
    together = [digest for part in PARTS for digest in drawn["one", part]]
    assert len(set(together)) == sum(counts.values()), "no picture twice"
    assert all(drawn["one", part] == drawn["two", part] for part in PARTS)
    assert not set(together) & {digest for part in PARTS for digest in drawn["three", part]}


def test_pictures_show_legible_sums_of_digits():
    rng = random.Random(0)
    for _ in range(200):
        shown = draw_sum(rng)
        assert shown.image.size == (WIDTH_PX, HEIGHT_PX)
        assert 0 <= shown.one <= LARGEST
        assert 0 <= shown.two <= LARGEST
        assert shown.answer == f"\\boxed{{{shown.one + shown.two}}}"
        light = np.asarray(shown.image).astype(float)
        lightness = (light.max(2) + light.min(2)) / 2 / 255
        assert lightness.max() - lightness.min() > MODEST * 0.9  # strokes of one pixel are blended at their edges
        edge = np.concatenate([lightness[0], lightness[-1], lightness[:, 0], lightness[:, -1]])
        assert np.ptp(edge) == 0, "nothing is written over the edge"


def test_result_is_the_object_that_the_command_line_prints(tmp_path, monkeypatch, capsys):
    judged = Judged((Prediction("test.jsonl:1", QUESTION, "\\boxed{8}", "\\boxed{8}", 7, True),), (1.0,))
    asked = {}

    def stand_in(**given):
        asked.update(given)
        return GrpoDemoResult(judged, judged, 100.0, given["run"], tmp_path / "page.html")

    monkeypatch.setattr("lensmith.demo_grpo.run_grpo_demo", stand_in)
    assert main(["demo", "grpo", "--run", str(tmp_path), "--seed", "3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    numbers = {"reward": 1.0, "accuracy": 1.0}
    assert told == {"before": numbers, "after": numbers, "train_s": 100.0, "run": str(tmp_path)}
    assert asked["seed"] == 3
