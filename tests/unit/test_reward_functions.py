"""Each named reward on completions judged by hand, and the sentences about rows that it cannot judge."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensmith.config.tree import Boxes
from lensmith.errors import RewardError
from lensmith.train.reward_functions import REWARDS, Completion
from lensmith.types import Message, Sample, Text

SCHEMA = {"type": "object", "required": ["total"], "properties": {"total": {"type": "number"}}}


def judge(reward, text, answer="", *, ids=(), truncated=False, boxes=None, columns=None, **parameters):
    turns = [Message("user", (Text("q?"),))] + ([Message("assistant", (Text(answer),))] if answer else [])
    sample = Sample("rows.jsonl:3", tuple(turns), (), columns or {}, boxes=boxes)
    return REWARDS[reward](Completion(text, ids, sample, truncated), **parameters)


def test_a_boxed_answer_is_missing_wrong_or_right():
    assert judge("math_boxed", "it is 42", "42") == -1
    assert judge("math_boxed", r"\boxed{42", "42") == -1
    assert judge("math_boxed", r"<think>\boxed{42}</think> so 42", "42") == -1
    assert judge("math_boxed", r"\boxed{41}", "42") == -0.5
    assert judge("math_boxed", r"\boxed{}", "42") == -0.5
    assert judge("math_boxed", r"<think>hm</think> \boxed{42.0}", "42") == 1
    assert judge("math_boxed", r"\boxed{1/2}", r"\boxed{\frac{1}{2}}") == 1
    assert judge("math_boxed", r"\boxed{3}", "42", missing=0, wrong=0.1, right=2) == 0.1


def test_short_answers_are_compared_as_the_metrics_of_their_names_do():
    assert judge("exact", "<think>a</think> The Dog\n", "The Dog") == 1
    assert judge("exact", "the dog", "The Dog") == 0
    assert judge("normalised", "<answer>two dogs.</answer>", "2 dogs") == 1
    assert judge("anls", "lens", "lense") == pytest.approx(0.8)
    assert judge("anls", "lens", "lense", threshold=0.2) == 0
    assert judge("relaxed_number", "104", "100") == 1
    assert judge("relaxed_number", "104", "100", tolerance=0.01) == 0
    assert judge("exact", r"so \boxed{B}", "B", read="boxed") == 1
    assert judge("exact", "B", "B", read="boxed") == 0
    assert judge("exact", "<answer>B</answer>", "B", read="text") == 0


def test_the_best_of_several_references_counts():
    assert judge("anls", "lens", columns={"answers": ["glass", "lense"]}, column="answers") == pytest.approx(0.8)
    assert judge("exact", "7", columns={"answers": np.array([6, 7])}, column="answers") == 1
    assert judge("exact", "teal", columns={"answer": "teal"}) == 1  # a row without an assistant's turn


def test_one_box_is_compared_with_one_box():
    box = '{"bbox_2d": [0, 0, 100, 100]}'
    assert judge("iou", "[50, 0, 150, 100]", box) == pytest.approx(1 / 3)
    assert judge("iou", f"```json\n[{box}]\n```", box) == 1
    assert judge("iou", "<think>[0,0,100,100]</think>[0,0,50,100]", box) == 0.5
    assert judge("iou", "[[0,0,100,100],[0,0,100,100]]", box) == 0  # two guesses are not an answer
    assert judge("iou", "on the left", box) == 0
    assert judge("iou", "[0, 0, 60, 100]", box, threshold=0.5) == 1
    assert judge("iou", "[0, 0, 40, 100]", box, threshold=0.5) == 0
    assert judge("iou", "[0, 0, 50, 100]", columns={"box": np.array([0, 0, 100, 100])}, column="box") == 0.5


def test_many_boxes_are_matched():
    rows = '[{"bbox_2d": [0, 0, 10, 10]}, {"bbox_2d": [50, 50, 60, 60]}]'
    assert judge("iou_match", "[[50, 50, 60, 60], [0, 0, 10, 10]]", rows) == 1
    assert judge("iou_match", "[0, 0, 10, 10]", rows) == 0.5
    assert judge("iou_match", "none", rows) == 0


def test_a_point_hits_a_box_or_not():
    box = "[0, 0, 100, 100]"
    for hit in ('{"point_2d": [50, 60]}', "[100, 0]", "(3, 4)", "[40, 40, 60, 60]"):
        assert judge("point_in_box", hit, box) == 1, hit
    for miss in ('{"point_2d": [101, 60]}', '{"points": [[5, 5], [6, 6]]}', "in the middle", "5, 5"):
        assert judge("point_in_box", miss, box) == 0, miss


def test_the_shape_of_a_completion_is_all_or_nothing():
    whole = "<think>\nso\n</think>\n<answer>42</answer>"
    assert judge("format", whole) == 1
    assert judge("format", whole.removeprefix("<think>"), opened=True) == 1
    assert judge("format", whole.removeprefix("<think>")) == 0
    assert judge("format", f"{whole} and more") == 0
    assert judge("format", f"{whole}{whole}") == 0
    assert judge("format", "<think>a</think><answer> </answer>") == 0
    assert judge("format", "<answer>42</answer>", shape="answer") == 1
    assert judge("format", "<answer>4</answer><answer>2</answer>", shape="answer") == 0
    assert judge("format", r"so \boxed{\frac{1}{2}}", shape="boxed") == 1
    assert judge("format", r"\boxed{1} or \boxed{2}", shape="boxed") == 0
    assert judge("format", r"\boxed{1", shape="boxed") == 0


def test_json_is_broken_unfit_or_valid():
    assert judge("json_schema", '{"total": 3}', schema=SCHEMA) == 1
    assert judge("json_schema", '```json\n{"total": 3}\n```', schema=SCHEMA) == 1
    assert judge("json_schema", '<think>{}</think>{"total": "3"}', schema=SCHEMA, mismatch=0.2) == 0.2
    for broken in ("{", "", '{"total": NaN}', "[" * 100_000, "total: 3"):
        assert judge("json_schema", broken, schema=SCHEMA, broken=-1) == -1, broken[:20]
    assert judge("json_schema", '{"total": 3}', columns={"schema": SCHEMA}) == 1
    assert judge("json_schema", '{"total": 3}', columns={"fields": json.dumps(SCHEMA)}, column="fields") == 1


def test_a_schema_fetches_nothing():
    elsewhere = {"$ref": "http://example.invalid/schema.json"}
    with pytest.raises(
        RewardError, match=r"rows\.jsonl:3: the schema refers to 'http://example\.invalid/.* nothing is fetched"
    ):
        judge("json_schema", "{}", columns={"schema": elsewhere})
    inside = {"$ref": "#/$defs/sum", "$defs": {"sum": SCHEMA}}
    assert judge("json_schema", '{"total": 3}', schema=inside) == 1


def test_length_follows_equation_13_of_dapo():
    # L_max 100, L_cache 20: nothing up to 80, then -1/20 per token, -1 beyond 100.
    for tokens, reward in ((0, 0), (80, 0), (81, -0.05), (90, -0.5), (100, -1), (101, -1)):
        assert judge("length", "", ids=[1] * tokens, max_tokens=100, cache_tokens=20) == pytest.approx(reward)
    assert judge("length", "", ids=[1] * 90, max_tokens=100) == -0.5
    assert judge("length", "", ids=[1] * 5, max_tokens=100, truncated=True) == -1
    assert judge("length", "", ids=[1] * 100, max_tokens=100, cache_tokens=0) == 0


def test_repetition_is_a_share_of_the_penalty():
    assert judge("repetition", "", ids=[5] * 5, ngram=2) == -0.75
    assert judge("repetition", "", ids=[1, 2, 3], ngram=2, penalty=-4.0) == 0


RANGES = {
    "math_boxed": (-1, 1),
    "exact": (0, 1),
    "normalised": (0, 1),
    "anls": (0, 1),
    "relaxed_number": (0, 1),
    "iou": (0, 1),
    "iou_match": (0, 1),
    "point_in_box": (0, 1),
    "format": (0, 1),
    "json_schema": (0, 1),
    "length": (-1, 0),
    "repetition": (-1, 0),
}
PIECES = st.sampled_from(
    [
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "\\boxed{",
        "}",
        "{",
        "[1,2,3,4]",
        '"bbox_2d":',
        "```",
        "42",
        " ",
        "\n",
        "é",
    ]
)


def test_every_reward_has_a_range():
    assert RANGES.keys() == REWARDS.keys()


@settings(deadline=None)  # the first formula starts the process that compares them
@given(st.lists(PIECES, max_size=12).map("".join), st.lists(st.integers(0, 5), max_size=20), st.booleans())
def test_whatever_a_model_writes_scores_within_the_range_and_twice_the_same(text, ids, truncated):
    given = {"length": {"max_tokens": 10}, "json_schema": {"schema": SCHEMA}}
    for name, (low, high) in RANGES.items():
        score = judge(name, text, "[1, 2, 30, 40]", ids=ids, truncated=truncated, **given.get(name, {}))
        assert low <= score <= high, name
        assert judge(name, text, "[1, 2, 30, 40]", ids=ids, truncated=truncated, **given.get(name, {})) == score


def test_a_column_that_a_row_lacks_is_named_with_those_it_has():
    with pytest.raises(
        RewardError, match=r"rows\.jsonl:3: column 'gold' is asked for, .* columns are: price, unit\. Add it"
    ):
        judge("exact", "3", columns={"price": 3, "unit": "$"}, column="gold")
    with pytest.raises(RewardError, match=r"column 'answer' is asked for, .* none besides the messages"):
        judge("math_boxed", r"\boxed{3}")
    with pytest.raises(RewardError, match=r"column 'gold' is a list of 0 references, and at least 1 is needed"):
        judge("exact", "3", columns={"gold": []}, column="gold")


def test_rows_whose_boxes_cannot_be_compared_are_named():
    with pytest.raises(
        RewardError, match=r"rows\.jsonl:3: iou compares 1 box with 1 box, but the row has 2\. Use iou_match"
    ):
        judge("iou", "", "[[0,0,1,1],[2,2,3,3]]")
    with pytest.raises(
        RewardError, match=r"the box \[0\.0, 0\.0, 1200\.0, 50\.0\] reaches beyond 0 to 1000, .* data\.boxes"
    ):
        judge("iou", "", "[0, 0, 1200, 50]")
    assert judge("iou", "[0, 0, 1200, 50]", "[0, 0, 1200, 50]", boxes=Boxes(target="resized_px")) == 1
    with pytest.raises(RewardError, match=r"0 boxes in 'answer', and at least 1 is needed .* begins 'on the left'"):
        judge("point_in_box", "", "on the left")
    with pytest.raises(RewardError, match=r"column 'schema' is no JSON Schema: 'objekt' is not valid.* Mend it"):
        judge("json_schema", "{}", columns={"schema": {"type": "objekt"}})
