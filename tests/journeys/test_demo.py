"""The demo from rows to page, two steps long; its full length is what `make demo` runs."""

import json
import re

import pytest

from lensmith.demo import DemoResult, demo_config, kind_of, run_demo, unused_folder, write_rows
from lensmith.evals.predict import read_predictions
from lensmith.evals.score import Score

QUESTIONS, STEPS = 40, 2


@pytest.fixture(scope="module")
def said():
    return []


@pytest.fixture(scope="module")
def result(tmp_path_factory, said):
    config = demo_config()
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"steps": STEPS})})
    return run_demo(run=tmp_path_factory.mktemp("demo") / "run", say=said.append, config=config, questions=QUESTIONS)


def test_demo_ends_with_accuracies_time_speed_and_folder(result):
    told = json.loads(json.dumps(result.to_json()))
    assert list(told) == ["before", "after", "train_s", "samples_per_s", "run"]
    assert told["before"]["n"] == told["after"]["n"] == QUESTIONS
    assert 0 <= told["before"]["accuracy"] <= 1
    effective = demo_config().optim.effective_samples
    assert told["samples_per_s"] * told["train_s"] == pytest.approx(STEPS * effective)


def test_demo_leaves_rows_answers_curve_and_page(result):
    before, after = (read_predictions(result.run / f"predictions-{when}.jsonl") for when in ("before", "after"))
    assert [(p.where, p.question, p.reference) for p in before] == [(p.where, p.question, p.reference) for p in after]
    assert (result.run / "loss.png").is_file()
    page = result.page.read_text(encoding="utf-8")
    assert len(re.findall(r'<img src="data:image/png', page)) >= 1 + 36
    assert "all questions" in page
    assert "yes or no" in page


def test_demo_says_what_changed_and_where_the_page_is(result, said):
    text = "\n".join(map(str, said))
    assert f"Of {QUESTIONS} questions, " in text
    assert f"before and after: {result.page}" in text


def test_a_second_demo_goes_beside_the_first(result):
    assert unused_folder(result.run) == result.run.with_name("run-2")
    assert unused_folder(result.run.with_name("fresh")) == result.run.with_name("fresh")


def test_rows_are_the_official_split_and_the_test_questions_the_seeds(tmp_path):
    train, test = write_rows(tmp_path / "one", seed=0)
    rows = [json.loads(line) for line in train.read_text(encoding="utf-8").splitlines()]
    asked = [json.loads(line) for line in test.read_text(encoding="utf-8").splitlines()]
    assert (len(rows), len({row["image"] for row in rows}), len(asked)) == (38_575, 4_000, 1_000)
    assert not {row["image"] for row in rows} & {row["image"] for row in asked}
    assert rows[0].keys() == {"image", "question", "answer"}
    assert {kind_of(row["answer"]) for row in rows} == {"yes or no", "which shape", "which colour"}
    assert write_rows(tmp_path / "two", seed=0)[1].read_bytes() == test.read_bytes()
    assert write_rows(tmp_path / "three", seed=1)[1].read_bytes() != test.read_bytes()


def test_demo_result_is_the_object_that_the_command_line_prints(tmp_path):
    score = Score("normalised", 0.5, 0.4, 0.6, 100)
    result = DemoResult(score, score, 100.0, 600.0, tmp_path, tmp_path / "page.html")
    assert result.to_json() == {
        "before": {"accuracy": 0.5, "n": 100},
        "after": {"accuracy": 0.5, "n": 100},
        "train_s": 100.0,
        "samples_per_s": 600.0,
        "run": str(tmp_path),
    }
