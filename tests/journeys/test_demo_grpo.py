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
from lensmith.demo_grpo import GrpoDemoResult, Judged, judge_answers_by_reward, run_grpo_demo
from lensmith.demo_sums import HEIGHT_PX, HELD_BACK, LARGEST, MODEST, PARTS, QUESTION, WIDTH_PX, draw_sum, write_sums
from lensmith.evals.predict import Prediction, read_predictions
from lensmith.types import Message, Sample, Text

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


def test_grpo_goes_on_from_the_warm_up_and_is_told_the_box_and_the_end(result):
    warm_up, grpo = (read_config(folder / "config.yaml") for folder in (result.run / "warm-up", result.run))
    assert (warm_up.task, grpo.task) == ("sft", "grpo")
    assert grpo.tune.start_from == str(result.run / "warm-up")
    assert grpo.grpo.rewards == ["math_boxed", {"name": "length", "max_tokens": 12, "cache_tokens": 0}]
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


def test_an_answer_is_right_to_its_last_character_and_rewards_want_it_to_end():
    answers = [("\\boxed{8}", True), ("It is \\boxed{8}.", True), ("\\boxed{8} 3ed{3", False), ("8", True)]
    predictions = [Prediction("test.jsonl:1", QUESTION, "\\boxed{8}", text, 7, stopped) for text, stopped in answers]
    sample = Sample(
        "test.jsonl:1", (Message("user", (Text(QUESTION),)), Message("assistant", (Text("\\boxed{8}"),))), ()
    )
    judged = judge_answers_by_reward(predictions, [sample] * len(answers))
    assert judged.right == [True, False, False, False]
    assert judged.rewards == (1.0, 1.0, 0.0, -1.0)
    assert judged.to_json() == {"reward": 0.25, "accuracy": 0.25}
    assert judged.accuracy([0, 2]).value == 0.5


def test_six_sums_are_in_the_test_alone(tmp_path):
    files = write_sums(tmp_path, 0, {"test": 200, "warm-up": 150, "train": 150})
    held_back = {
        part: {json.loads(line)["held_back"] for line in files[part].read_text(encoding="utf-8").splitlines()}
        for part in PARTS
    }
    assert held_back == {"test": {True, False}, "warm-up": {False}, "train": {False}}
    numbers = range(LARGEST + 1)
    sums = [(one, two) for one in numbers for two in numbers]
    assert sum({one, two} in HELD_BACK for one, two in sums) == 6
    results = {one + two for one, two in sums if {one, two} not in HELD_BACK}
    assert {one + two for pair in HELD_BACK for one, two in [sorted(pair)]} <= results, "no result is new"


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
