"""Every named metric, against its public definition or numbers worked by hand."""

import inspect
import re
import time
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensmith.config.tree import MetricName
from lensmith.errors import ConfigError, DataError
from lensmith.evals.metrics import METRICS, Reference, accepted_answers
from lensmith.evals.own_metrics import load_metric, own_metric
from lensmith.evals.score import find_metric, judge_answers, score_answers
from lensmith.evals.text_metrics import char_error_rate, vqa_soft, word_error_rate
from lensmith.train.reward_functions import REWARDS, Completion
from lensmith.types import Message, Sample, Text

texts = st.text(st.sampled_from("ab 1{}[]():,.\"'A<think>é"), max_size=30)


def value(name, answer, *accepted, question="", **columns):
    return METRICS[name].value(answer, Reference(accepted, question, columns))


def box(*numbers, label="cat"):
    return f'{{"bbox_2d": {list(numbers)}, "label": "{label}"}}'


def test_the_config_knows_every_metric_and_no_other():
    assert set(typing.get_args(MetricName)) == {"auto", *METRICS}


def test_every_metric_says_its_range_its_use_and_its_source():
    for metric in METRICS.values():
        assert re.search(r"Range: .*\nFor: .*\nSource: ", inspect.getdoc(metric.judge), re.DOTALL), metric.name


@settings(deadline=None)  # the first formula starts the process that compares them
@given(answer=texts, reference=texts.filter(str.strip), question=texts)
def test_every_metric_stays_between_nothing_and_one(answer, reference, question):
    needs = {"point": box(1, 2, 3, 4), "json_f1": '{"a": 1}'}
    for metric in METRICS.values():
        row = Reference((needs.get(metric.name, reference),), question, {"schema": {"type": "object"}})
        assert 0 <= metric.value(answer, row) <= 1


def test_the_reference_itself_is_perfect():
    right = {
        "json_f1": '{"a": [1, "x"]}',
        "choice": "B",
        "boxed": r"\boxed{7}",
        "format": "<think>t</think><answer>x</answer>",
    }
    right |= {"json_schema": "{}"}
    for name, metric in METRICS.items():
        text = right.get(name, box(10, 10, 90, 90))
        row = Reference((text.removeprefix(r"\boxed{").rstrip("}") if name == "boxed" else text,), "", {"schema": {}})
        assert metric.value(text, row) == (0 if metric.lower_is_better else 1), name


def test_no_metric_reads_the_thought():
    for name in ("exact", "normalised", "anls", "relaxed", "vqa_soft", "token_f1", "choice"):
        assert value(name, "<think>is it 4? no</think>\n<answer>B</answer>", "B") == 1, name
        assert value(name, "<think>B", "B") == 0, f"{name}: a thought that never ends"
    assert value("boxed", r"<think>\boxed{3}</think> so 4", "3") == 0


def test_of_several_accepted_answers_the_best_counts():
    assert value("exact", "NYC", "New York", "NYC") == 1
    assert value("anls", "nyc!", "New York", "NYC") == 0.75
    assert value("cer", "nyc", "new york", "nyx") == pytest.approx(1 / 3)
    assert value("relaxed", "104", "7", "100") == 1


def official_vqa(answer, people):
    """The inner loop of the public evaluation, https://github.com/GT-Vision-Lab/VQA, for texts that need no cleaning."""
    accuracies = []
    for left_out in range(len(people)):
        others = [one for number, one in enumerate(people) if number != left_out]
        accuracies.append(min(1, sum(one == answer for one in others) / 3))
    return sum(accuracies) / len(accuracies)


@given(st.lists(st.sampled_from(["red", "blue", "teal"]), min_size=4, max_size=10))
def test_vqa_soft_is_the_public_evaluation_for_four_people_and_more(people):
    assert vqa_soft("red", people) == pytest.approx(official_vqa("red", people))


def test_vqa_soft_by_hand():
    # Known of the public evaluation: 1, 2, 3 and 4 of ten people give 0.3, 0.6, 0.9 and 1.
    for matches, expected in enumerate([0, 0.3, 0.6, 0.9, 1, 1]):
        assert vqa_soft("Two", ["2"] * matches + ["three"] * (10 - matches)) == pytest.approx(expected)
    assert vqa_soft("red", ["red"]) == 1
    assert vqa_soft("red", ["red", "red", "red"]) == 1, "as unanimous as three people can be"
    assert vqa_soft("red", ["red", "blue"]) == 0.5
    assert vqa_soft("red", []) == 0


@pytest.mark.parametrize(
    ("answer", "reference", "characters", "words"),
    [
        ("sitting", "kitten", 3 / 6, 1),  # Levenshtein's own example
        ("the cat sat", "the cat sat", 0, 0),
        ("the cat", "the cat sat", 4 / 11, 1 / 3),
        ("the bad cat sat", "the cat sat", 4 / 11, 1 / 3),
        ("The cat", "the cat", 1 / 7, 1 / 2),  # case counts
        ("a  b", "a b ", 1 / 3, 0),
        ("cafe\u0301", "caf\u00e9", 0, 0),  # composed or not
        ("x" * 50, "ab", 1, 1),  # 25 times as many edits as characters
        ("", "ab", 1, 1),
        ("ab", "", 1, 1),
        ("", "", 0, 0),
    ],
)  # fmt: skip
def test_error_rates_are_edits_per_unit_of_the_reference(answer, reference, characters, words):
    assert char_error_rate(answer, reference) == pytest.approx(characters)
    assert word_error_rate(answer, reference) == pytest.approx(words)


def test_boxes_are_counted_at_their_thresholds():
    reference = f"[{box(0, 0, 100, 100)}, {box(200, 0, 300, 100)}]"
    answer = f"[{box(0, 0, 100, 60)}, {box(200, 0, 300, 80)}]"  # IoU 0.6 and 0.8
    assert value("iou", answer, reference) == pytest.approx(0.7)
    assert value("iou@0.5", answer, reference) == 1
    assert value("iou@0.75", answer, reference) == 0.5
    assert value("iou@0.5", f"{answer}, {box(500, 0, 600, 100)}", reference) == pytest.approx(2 / 3), "one too many"
    assert value("iou", "no cat here", "[]") == 1
    assert value("iou@0.5", answer, "[]") == 0


def test_hits_are_as_many_as_a_matching_allows():
    """The matching of the largest IoU sum would pair 0.9 with 0.1; two of 0.5 or more are possible."""
    reference = f"[{box(0, 0, 100, 100)}, {box(0, 0, 100, 55)}]"
    answer = f"[{box(0, 0, 100, 60)}, {box(0, 0, 100, 100)}]"
    assert value("iou@0.5", answer, reference) == 1


def test_boxes_are_read_in_the_convention_of_the_data():
    row = Reference(("[100, 100, 50, 50]",), boxes="xywh_px")
    assert METRICS["iou"].value("[100, 100, 50, 50]", row) == 1
    assert METRICS["iou"].value("[125, 100, 50, 50]", row) == pytest.approx(1 / 3)
    assert METRICS["iou"].value("[125, 100, 50, 50]", Reference(row.answers)) == 0, "corners that are swapped"


def test_a_point_lies_in_a_box_of_the_reference():
    reference = box(100, 100, 200, 200)
    for answer in ('{"point_2d": [150, 160]}', "[150, 160]", box(140, 140, 160, 160)):
        assert value("point", answer, reference) == 1
    assert value("point", "[250, 160]", reference) == value("point", "[150, 150], [150, 150]", reference) == 0
    with pytest.raises(ValueError, match="holds 0 boxes"):
        value("point", "[1, 2]", "left of the cat")


RECEIPT = '{"total": 12.5, "items": [{"name": "tea", "price": 2}, {"name": "cake", "price": 3}]}'


@pytest.mark.parametrize(
    ("answer", "f1"),
    [
        (RECEIPT, 1),
        (f"```json\n{RECEIPT}\n```", 1),
        ('{"items": [{"price": 3.0, "name": " cake"}, {"price": 2, "name": "tea"}], "total": 12.50}', 1),
        ('{"total": 12.5}', 2 * 1 / (1 + 5)),
        ('{"total": 12.5, "items": [{"name": "tea", "price": 3}]}', 2 * 3 / (3 + 5)),
        ('{"total": 12.5, "tip": 1, "items": []}', 2 * 1 / (2 + 5)),
        ('{"total": "12.5", "items": []}', 2 * 1 / (1 + 5)),  # Donut compares texts, and so a number in quotes is one
        ("total: 12.5", 0),
        ('{"total": 12.5', 0),
        ("[" * 100_000, 0),
    ],
)  # fmt: skip
def test_json_f1_is_over_fields(answer, f1):
    assert value("json_f1", answer, RECEIPT) == pytest.approx(f1)


def test_json_of_nothing_and_of_a_broken_reference():
    assert value("json_f1", "{}", "[]") == 1
    assert value("json_f1", '{"a": null}', '{"a": null}') == 1
    with pytest.raises(ValueError, match="the reference 'paid' is no JSON"):
        value("json_f1", "{}", "paid")


CAPITALS = "What is the capital of France?\nA. Rome\nB. Paris\nC. New York\nD. York"


@pytest.mark.parametrize(
    "answer",
    ["B", "b", "(B)", "B.", "B. Paris", "(B) Paris", "**B**", "B) because of the tower", "The answer is B", "Paris", "paris.",
     "The correct answer is (B).", "Answer: B", r"so \boxed{B}", "The answer is Paris.", "It must be Paris, I think.",
     "Not A: the answer is B because it is in France", "option B", "I would choose B", "Let me see. **B** fits."],
)  # fmt: skip
def test_a_choice_is_found_however_it_is_said(answer):
    assert value("choice", answer, "B", question=CAPITALS) == 1
    assert value("choice", answer, "Paris", question=CAPITALS) == 1
    assert value("choice", answer, "C", question=CAPITALS) == 0


@pytest.mark.parametrize("answer", ["", "E", "A or B", "Rome or Paris", "A big city", "The answer is a city", "Berlin"])
def test_what_means_no_option_or_several_is_wrong(answer):
    assert value("choice", answer, "B", question=CAPITALS) == 0
    assert value("choice", answer, "A", question=CAPITALS) == 0


def test_no_answer_keeps_the_search_busy():
    started = time.perf_counter()
    for text in ("answer" + "\n" * 50_000, "answer " * 10_000, "(A " * 20_000, " " * 50_000 + "A", "\n" * 50_000):
        value("choice", text, "B", question=CAPITALS)
        value("choice", "B", "B", question=text)
    assert time.perf_counter() - started < 5


def test_an_option_within_another_ones_text_is_not_meant():
    assert value("choice", "It is New York", "C", question=CAPITALS) == 1


@pytest.mark.parametrize(
    ("question", "columns"),
    [
        ("Capital? (A) Rome (B) Paris", {}),
        ("Capital?", {"options": ["Rome", "Paris"]}),
        ("Capital?", {"choices": ["A. Rome", "B. Paris"]}),
    ],
)
def test_options_stand_in_the_question_or_in_a_column(question, columns):
    assert value("choice", "paris", "B", question=question, **columns) == 1
    assert value("choice", "Rome", "B", question=question, **columns) == 0


def test_without_known_options_a_letter_is_compared_and_a_text_as_normalised():
    assert value("choice", "The answer is C.", "c") == 1
    assert value("choice", "The Paris", "paris") == 1


def test_schema_and_format_judge_as_their_rewards_do():
    schema = {"type": "object", "required": ["total"]}
    for text in ('{"total": 1}', "{}", "total", '```json\n{"total": 1}\n```', "<think>a</think><answer>{}</answer>"):
        sample = Sample("r:1", (Message("user", (Text("?"),)),), (), {"schema": schema})
        completion = Completion(text, [], sample, False)
        for name in ("json_schema", "format"):
            assert value(name, text, "x", schema=schema) == REWARDS[name](completion), (name, text)


def test_accepted_answers_come_from_the_column_however_it_is_written():
    assert accepted_answers("a", {}) == ("a",)
    assert accepted_answers("a", {"answers": ["b", "c"]}) == ("b", "c")
    assert accepted_answers("a", {"answers": [{"answer": "b", "answer_id": 1}, {"answer": "c"}]}) == ("b", "c")
    assert accepted_answers("a", {"answers": '["b", 3]'}) == ("b", "3")
    for unusable in (None, [], "b", "[b", 7, {"text": "b"}, [None]):
        assert accepted_answers("a", {"answers": unusable}) == ("a",)


OWN = """
def near(answer, reference, within=1, **columns):
    return abs(float(answer) - float(reference)) <= columns.get("slack", within)
def needs_unit(answer, reference, unit):
    return answer == reference + unit
def too_much(answer, reference):
    return 2
def says_so(answer, reference):
    return "right"
def wrong_order(reference, answer):
    return 1
"""


@pytest.fixture
def root(tmp_path):
    (tmp_path / "mine.py").write_text(OWN, encoding="utf-8")
    return tmp_path


def test_a_metric_of_ones_own_gets_the_columns_it_asks_for(root):
    near = load_metric("mine.py:near", root)
    assert near.value("<think>hm</think> 5", Reference(("9", "6"))) == 1
    assert near.value("5", Reference(("9",), columns={"slack": 4, "answer": "x"})) == 1
    assert load_metric("mine.py:needs_unit", root).value("5 cm", Reference(("5",), columns={"unit": " cm"})) == 1


def test_what_a_metric_of_ones_own_raises_is_counted_and_shown(root):
    judged = judge_answers(["5", "five", "6", "six"], ["5"] * 4, load_metric("mine.py:near", root))
    assert judged.values.tolist() == [1, 0, 1, 0]
    assert judged.failure_sentence(["t:1", "t:2", "t:3", "t:4"]) == (
        "metric mine.py:near failed for 2 of 4 answers, which count as 0; the first: t:2: could not convert string to float: "
        "'five'"
    )


def test_a_metric_that_cannot_judge_the_reference_itself_stops(root):
    for name, reason in [
        ("too_much", "returned 2, where a number from 0 to 1"),
        ("says_so", "returned 'right', a str, where"),
        ("needs_unit", "asks for the column 'unit', but the row has question"),
    ]:
        with pytest.raises(
            DataError, match=f"could judge 0 of 1 answer, nor the reference itself; the first: {reason}"
        ):
            judge_answers(["a"], ["a"], load_metric(f"mine.py:{name}", root))


def test_answers_of_a_model_that_has_learned_nothing_are_all_counted_as_failed(root):
    judged = judge_answers(["??", "uh"], ["5", "6"], load_metric("mine.py:near", root))
    assert judged.values.tolist() == [0, 0]
    assert "failed for 2 of 2 answers" in judged.failure_sentence(["t:1", "t:2"])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("mine.py:nere", r"eval\.metric: mine\.py has no function 'nere'; .* Did you mean near\?"),
        ("mien.py:near", r"eval\.metric: 'mien\.py:near' names the file .*Write it as my_metrics\.py:price_match"),
        ("mine.py:wrong_order", r"takes reference, answer, but its first two parameters must be answer and reference"),
        ("acuracy", r"eval\.metric: there is no metric 'acuracy' among exact, "),
        ("anlss", r"Did you mean anls\?"),
    ],
)
def test_a_metric_written_wrongly_is_answered_with_a_sentence(root, name, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_metric(name, root)


def test_a_function_is_a_metric_too():
    assert (
        score_answers(["a", "b"], ["a", "a"], own_metric(lambda answer, reference: answer == reference, "mine")).value
        == 0.5
    )


def test_a_metric_whose_library_is_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("lensmith.evals.score.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"eval\.metric=map needs pycocotools.*pip install 'lensmith\[map\]'"):
        find_metric("map")
