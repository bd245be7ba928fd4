"""From kept predictions to scores, comparisons, groups and warnings: no model anywhere."""

import dataclasses
import json
import re

import numpy as np
import pytest

from lensmith.config.tree import Eval
from lensmith.errors import DataError
from lensmith.evals.breakdown import answer_type, break_down, groupings_of, script_of, size_bucket
from lensmith.evals.degenerate import find_degenerate, is_repetitive
from lensmith.evals.guess import guess_metric
from lensmith.evals.metrics import Reference
from lensmith.evals.results import (
    Prediction,
    compare_results,
    kept_columns,
    read_predictions,
    score_predictions,
    write_predictions,
)
from lensmith.evals.score import Score


def asked(reference, answer, number=1, *, question="What?", file="test.jsonl", stopped=True, image_px=None, **columns):
    return Prediction(f"{file}:{number}", question, reference, answer, 3, stopped, columns, None, image_px)


def result(pairs, metric="auto", **more):
    return score_predictions(
        [asked(*pair, number, **more) for number, pair in enumerate(pairs, 1)], Eval(metric=metric)
    )


def test_a_graded_score_is_a_mean_with_a_bootstrapped_interval():
    anls = result([("teal", "teal"), ("teal", "tea"), ("teal", "red"), ("circle", "circles")], "anls")
    assert anls.values == pytest.approx([1, 0.75, 0, 6 / 7])
    assert anls.score.value == pytest.approx(np.mean(anls.values))
    assert 0 < anls.score.low < anls.score.value < anls.score.high < 1
    assert anls.score_of([0, 2]).value == 0.5
    assert (
        anls.score == result([("teal", "teal"), ("teal", "tea"), ("teal", "red"), ("circle", "circles")], "anls").score
    )


def test_graded_values_that_are_all_right_or_wrong_are_a_proportion():
    pairs = [("teal", "teal"), ("teal", "red"), ("teal", "teal")]
    anls, exact = result(pairs, "anls").score, result(pairs, "exact").score
    assert (anls.value, anls.low, anls.high) == (exact.value, exact.low, exact.high)


def test_graded_answers_are_compared_by_how_much_they_changed():
    before = result([("teal", "tea"), ("teal", "teal"), ("circle", "x"), ("red", "red")], "anls")
    after = result([("teal", "teal"), ("teal", "tealx"), ("circle", "circle"), ("red", "red")], "anls")
    compared = compare_results(before, after)
    assert (compared.wins, compared.losses, compared.ties) == (2, 1, 1)
    assert compared.difference == pytest.approx(after.score.value - before.score.value)
    assert compared.low < compared.difference < compared.high
    assert compared.p_value == 4 / 8  # of the 8 patterns of signs, 4 reach 0.25 - 0.2 + 1 to either side
    assert compared.sentence == (
        "Of 4 questions, 2 answers became better and 1 worse by anls (p = 0.5, paired randomisation test)."
    )
    assert compared.difference_sentence.startswith("The score changed by +26.2 points (95 % interval ")


def test_an_error_rate_that_falls_is_a_win():
    before, after = (
        result([("kitten", "sitting"), ("abc", "abc")], "cer"),
        result([("kitten", "kitten"), ("abc", "abd")], "cer"),
    )
    compared = compare_results(before, after)
    assert (compared.wins, compared.losses) == (1, 1)
    assert compared.difference == pytest.approx((-1 / 2 + 1 / 3) / 2)
    assert "by cer, of which less is better" in compared.sentence
    assert after.score.is_better_than(before.score.value)
    assert not before.score.is_better_than(after.score.value)
    assert str(after.score).endswith("n=2, lower is better)")


def test_right_and_wrong_have_a_difference_with_its_interval_too():
    compared = compare_results(
        result([("a", "x"), ("b", "b")] * 20, "exact"), result([("a", "a"), ("b", "b")] * 20, "exact")
    )
    assert (compared.wins, compared.losses, compared.difference) == (20, 0, 0.5)
    assert 0.3 < compared.low < 0.5 < compared.high < 0.7


def test_a_comparison_is_by_the_metric_of_before():
    before, after = result([("Teal", "teal")], "exact"), result([("Teal", "Teal.")], "normalised")
    assert compare_results(before, after).ties == 1
    assert compare_results(after, before).metric == "normalised"


def test_predictions_of_older_versions_are_read(tmp_path):
    line = {"where": "t:1", "question": "?", "reference": "a", "answer": "a", "tokens": 1, "stopped": True}
    (tmp_path / "old.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    (old,) = read_predictions(tmp_path / "old.jsonl")
    assert (old.columns, old.boxes, old.image_px) == ({}, None, None)
    assert score_predictions([old], Eval()).score.value == 1


def test_kept_predictions_score_as_they_did(tmp_path):
    kept = [asked("a", "b", 1, image_px=(480, 640), answers=["a", "b"], source_id=7), asked("c", "c", 2)]
    write_predictions(kept, tmp_path / "kept.jsonl")
    assert read_predictions(tmp_path / "kept.jsonl") == kept
    again = score_predictions(read_predictions(tmp_path / "kept.jsonl"), Eval(metric="exact"))
    assert again.score.value == 1
    assert again.why == "metric exact: set by eval.metric; 1 of 2 rows have several accepted answers (column answers)"


def test_columns_are_kept_as_far_as_json_can_say_them():
    columns = {
        "answers": np.array(["a", "b"]),
        "n": np.int64(3),
        "raw": b"\x00",
        "long": "x" * 30_000,
        "odd": object(),
        "no": None,
    }
    assert kept_columns(columns) == {"answers": ["a", "b"], "n": 3, "no": None}


BOXES = '[{"bbox_2d": [1, 2, 30, 40], "label": "cat"}]'
OPTIONS = "Which?\nA. one\nB. two"


@pytest.mark.parametrize(
    ("rows", "name", "told"),
    [
        ([Reference((BOXES,))] * 3, "iou", "3 of 3 answers are boxes"),
        ([Reference(("[1, 2, 30, 40]",), boxes="xyxy_px")] * 2, "iou", "2 of 2"),
        ([Reference(("[1, 2, 30, 40]",))] * 2, "exact", "code, markup"),
        (['{"total": 3, "box": [1, 2, 30, 40]}'], "json_f1", "1 of 1 answers are JSON objects"),
        (['At {"bbox_2d": [1, 2, 30, 40]}'], "normalised", "short answers"),
        (['{"total": 3}', '{"total": 5}', "7"], "json_f1", "2 of 3 answers are JSON objects, compared field by field"),
        ([Reference(("B",), OPTIONS)] * 2, "choice", "2 of 2 answers are letters of options in the question"),
        ([Reference(("B",), "Which vitamin?")] * 2, "normalised", "short answers"),
        ([Reference(("red",) * 10)] * 2, "vqa_soft", "2 of 2 rows have several accepted answers"),
        ([Reference(("red", "dark red"))] * 2, "anls", "the nearest in spelling counts"),
        ([Reference(("12.5",), "What does the bar show?")] * 2, "relaxed", "2 questions speak of charts"),
        ([Reference(("2015",), "In which year?")] * 2, "normalised", "short answers"),
        (["the dog runs over a green field towards the tree"], "token_f1", "10 words or more.*knows no meaning"),
        (["<think>let me see, one two three four five six seven</think> two"], "normalised", "1 or fewer words"),
    ],
)  # fmt: skip
def test_the_metric_is_guessed_from_the_data_and_said(rows, name, told):
    guessed, sentence = guess_metric(rows)
    assert guessed == name
    assert sentence.startswith(f"metric {name}")
    assert re.search(told, sentence)


def test_a_score_is_broken_down_by_a_column_largest_group_first():
    rows = [
        asked("a", "a" if n % 3 else "b", n, kind="sign" if n < 20 else "menu" if n < 30 else f"rare {n}")
        for n in range(36)
    ]
    broken = score_predictions(rows, Eval(metric="exact"))
    groups = break_down(broken, "kind")
    assert [(group.name, group.n) for group in groups] == [("sign", 20), ("menu", 10), ("other", 6)]
    assert sum(group.n * group.score.value for group in groups) == pytest.approx(36 * broken.score.value)
    assert all(isinstance(group.score, Score) and group.score.low < group.score.high for group in groups)
    assert [group.name for group in break_down(broken, "kind", most=1)] == ["sign", "other"]
    with pytest.raises(DataError, match=r"breakdown by 'kid': none of 36 rows .* Did you mean kind\?"):
        break_down(broken, "kid")


def test_a_single_small_group_keeps_its_name():
    broken = score_predictions([asked("a", "a", n, kind="x" if n else "y") for n in range(9)], Eval(metric="exact"))
    assert [(group.name, group.n) for group in break_down(broken, "kind")] == [("x", 8), ("y", 1)]


def test_answers_are_grouped_by_what_can_be_seen_without_a_column():
    rows = [asked("yes", "yes", n, file="a.jsonl", image_px=(480, 640)) for n in range(6)]
    rows += [asked("12", "12", n, file="b.parquet", question="何色?", image_px=(3000, 100)) for n in range(7)]
    broken = score_predictions(rows, Eval())
    names = {by: [group.name for group in break_down(broken, by)] for by in groupings_of(rows)}
    assert names == {
        "source": ["b.parquet", "a.jsonl"],
        "script": ["Han", "Latin"],
        "answer_type": ["number", "yes or no"],
        "image_size": ["2,048 to 4,095 px", "512 to 1,023 px"],
    }


@pytest.mark.parametrize(
    ("text", "kind"),
    [("Yes.", "yes or no"), ("12 %", "few words"), ("12%", "number"), ("teal", "word"), ("dark teal", "few words"),
     (BOXES, "boxes"),
     ('{"a": 1}', "JSON"), ("a dog runs over a green field to me", "prose"), ("<think>1</think>no", "yes or no")],
)  # fmt: skip
def test_the_type_of_an_answer(text, kind):
    assert answer_type(text) == kind


def test_scripts_and_sizes():
    names = {
        "hello": "Latin",
        "привет": "Cyrillic",
        "你好": "Han",
        "これは赤": "Japanese",
        "안녕": "Korean",
        "مرحبا": "Arabic",
    }
    assert {text: script_of(text) for text in names} == names
    assert script_of("12 + 3") == "(none)"
    assert [size_bucket(px) for px in (None, (10, 255), (256, 10), (9000, 1))] == [
        "(none)", "below 256 px", "256 to 511 px", "4,096 px and more",
    ]  # fmt: skip


HEALTHY = [("red", "red"), ("blue", "red"), ("two dogs", "2 dogs"), ("a cat", "the dog"), ("teal", "teal")] * 4


def degenerate(pairs, **more):
    return find_degenerate([asked(*pair, number, **more) for number, pair in enumerate(pairs, 1)])


def test_ordinary_answers_are_not_degenerate():
    assert degenerate(HEALTHY) == []
    assert degenerate([("yes", "yes")] * 17 + [("no", "yes")] * 3) == [], "nearly as common among the references"
    assert degenerate([("a", "b")]) == []


def test_going_round_in_circles_is_named():
    loop = "the cat and the dog and " * 20
    assert is_repetitive(loop)
    assert is_repetitive("红色的圆" * 20)
    assert not is_repetitive(
        "The small red circle stands left of a larger blue square, and both lie on a plain grey table."
    )
    assert not is_repetitive("no no no")
    (sentence,) = degenerate([*HEALTHY, ("red", loop)])
    assert sentence.startswith("Repetition: 1 of 21 answers go round in circles, the first at test.jsonl:21. ")
    assert degenerate([*HEALTHY, (loop, loop)]) == [], "learned from a reference that does so"


def test_never_ending_is_named():
    (sentence,) = degenerate(HEALTHY, stopped=False)
    assert sentence.startswith("Never ending: 20 of 20 answers were cut off")


def test_one_answer_for_all_is_named_with_both_shares():
    (sentence,) = degenerate([(reference, "No.") for reference, _ in HEALTHY])
    assert sentence.startswith(
        "One answer for all: 'no' is given to 100% of 20 questions, while the commonest right answer fits 20%."
    )


def test_saying_nothing_is_named_and_thoughts_that_never_end_with_it():
    (sentence,) = degenerate([*HEALTHY, ("red", ""), ("red", "<think>is it")])
    assert sentence.startswith(
        "Empty: 2 of 22 answers say nothing, 1 of them behind a thought that never ended; the first at "
    )


def test_another_script_than_the_reference_is_named():
    (sentence,) = degenerate([*HEALTHY, ("yellow", "是黄色的")])
    assert sentence == (
        "Another language: 1 of 21 answers are in another script than their reference, the first at test.jsonl:21 in Han "
        "instead of Latin."
    )


def test_results_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        result([("a", "a")]).metric = "exact"
