"""Rewards from a config to a table: how they are written, a user's own functions, weights, and what fails."""

import asyncio
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lensmith.errors import ConfigError, RewardError
from lensmith.train.rewards import RewardBatch, extract_boxed_answer, load_rewards, read_reward_specs
from lensmith.types import ImageMark, ImageRef, Message, Sample, Text

OWN = '''
import asyncio
TOLD = []

def price_match(completions, prompts=None, answer=None, images=None, completion_ids=None, **columns):
    """TRL's convention."""
    TOLD.append((prompts, [list(one) for one in images], completion_ids, columns))
    return [float(c[0]["content"] == a) for c, a in zip(completions, answer)]

def visual_math_reward(completions, images=None, ground_truths=None, **kwargs):
    return [1.0 if c[0]["content"] == gt else -0.5 for c, gt in zip(completions, ground_truths)]

def near(completion: str, price: float, within: float = 1.0) -> float:
    return float(abs(float(completion) - price) <= within)

async def slow(completion, answer):
    await asyncio.sleep(0.2)
    return None if completion == "41" else 1.0

async def slow_batch(completions, **columns):
    await asyncio.sleep(0.2)
    return [0.25] * len(completions)

def short(completions, **columns):
    return [1.0]

def words(completions, **columns):
    return ["good"] * len(completions)

def one(completions, **columns):
    return 1.0

def infinite(completion):
    return float("inf")

def faulty(completion):
    return 1 / (int(completion) - 41)

def needs_unit(completions, unit, **columns):
    return [1.0] * len(completions)
'''


@pytest.fixture
def root(tmp_path):
    (tmp_path / "my_rewards.py").write_text(OWN, encoding="utf-8")
    return tmp_path


def sample(where, answer, images=(), **columns):
    marks = tuple(ImageMark(number) for number in range(len(images)))
    turns = (Message("user", (*marks, Text("How much?"))), Message("assistant", (Text(answer),)))
    return Sample(where, turns, tuple(images), columns)


def batch(*texts, samples=None):
    samples = samples or [sample(f"rows.jsonl:{number + 1}", "42", price=42) for number in range(len(texts))]
    return RewardBatch(texts, [[1, 2]] * len(texts), samples, [False] * len(texts))


def test_weights_add_up_and_what_says_nothing_is_left_out(root):
    rewards = load_rewards(
        ["exact", {"name": "math_boxed", "weight": 2}, {"name": "my_rewards.py:slow", "weight": 0.5}], root=root
    )
    table = rewards.score(batch("42", "41"))
    assert table.names == rewards.names == ("exact", "math_boxed", "slow")
    assert table.values.dtype == np.float64
    np.testing.assert_array_equal(table.values, [[1, -1, 1], [0, -1, math.nan]])
    np.testing.assert_array_equal(table.total, [1 - 2 + 0.5, 0 - 2])
    assert table.failures == {}
    assert table.num_unscored == 0


def test_a_completion_of_which_nothing_is_said_is_nan_and_counted(root):
    table = load_rewards(["my_rewards.py:slow"], root=root).score(batch("42", "41"))
    np.testing.assert_array_equal(table.total, [1, math.nan])
    assert table.num_unscored == 1


def test_a_function_in_trls_form_gets_what_trl_gives(root, tmp_path):
    Image.new("RGB", (4, 2), (9, 8, 7)).save(tmp_path / "a.png")
    ref = ImageRef(tmp_path / "a.png", "a")
    rows = [sample("rows.jsonl:1", "42", [ref], unit="$"), sample("rows.jsonl:2", "5")]
    rewards = load_rewards(["my_rewards.py:price_match", "my_rewards.py:visual_math_reward"], root=root)
    table = rewards.score(batch("42", "6", samples=rows))
    np.testing.assert_array_equal(table.values, [[1, 1], [0, -0.5]])
    ((prompts, images, ids, columns),) = rewards.rewards[0].function.__globals__["TOLD"]
    assert prompts[0] == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How much?"}]}]
    assert prompts[1] == [{"role": "user", "content": "How much?"}]
    assert images[0][0].size == (4, 2)
    assert images[1] == []
    assert ids == [[1, 2], [1, 2]]
    assert columns == {"unit": ["$", None], "truncated": [False, False]}


def test_a_function_of_one_completion_gets_the_columns_it_names(root):
    rewards = load_rewards([{"name": "my_rewards.py:near", "within": 3}], root=root)
    np.testing.assert_array_equal(rewards.score(batch("40", "46")).values, [[1], [0]])


def test_python_functions_can_be_given_as_they_are(tmp_path):
    def long(completions, **columns):
        return np.array([len(completion[0]["content"]) for completion in completions])

    table = load_rewards([long, {"name": long, "as": "again", "weight": -1}], root=tmp_path).score(batch("abc", "d"))
    assert table.names == ("long", "again")
    np.testing.assert_array_equal(table.values, [[3, 3], [1, 1]])
    np.testing.assert_array_equal(table.total, [0, 0])


def test_async_rewards_wait_side_by_side_also_inside_a_running_loop(root):
    rewards = load_rewards(["my_rewards.py:slow", "my_rewards.py:slow_batch"], root=root)

    async def notebook():
        return rewards.score(batch(*["42"] * 10))

    start = time.monotonic()
    table = asyncio.run(notebook())
    assert time.monotonic() - start < 1.5  # one after the other: 2.2 s
    np.testing.assert_array_equal(table.values, [[1, 0.25]] * 10)


def test_a_reward_that_raises_counts_as_nan_for_that_completion_and_is_told(root):
    table = load_rewards(["exact", "my_rewards.py:faulty"], root=root).score(batch("42", "41", "43"))
    np.testing.assert_array_equal(table.values, [[1, 1], [0, math.nan], [0, 0.5]])
    np.testing.assert_array_equal(table.total, [2, 0, 0.5])
    failure = table.failures["faulty"]
    assert failure.count == 1
    assert failure.first == ("rows.jsonl:2: reward faulty (my_rewards.py:faulty): ZeroDivisionError: division by zero")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("short", "returned 1 number for 2 completions, where one each is needed"),
        ("words", "returned 'good', a str, where a number or None is needed"),
        ("one", "returned 1.0, where a list of 2 numbers is needed"),
        ("infinite", "returned inf, where a finite number or None is needed"),
        ("needs_unit", "column 'unit' is asked for, but the row's columns are: price. Add it to the rows"),
    ],
)
def test_what_a_reward_returns_wrongly_is_said_with_both_numbers(root, name, sentence):
    rewards = load_rewards([f"my_rewards.py:{name}"], root=root)
    table = rewards.score(batch("42", "41"))
    assert np.isnan(table.values).all()
    assert table.num_unscored == 2
    assert table.failures[name].count == 2
    assert f"reward {name} (my_rewards.py:{name}): {sentence}" in table.failures[name].first


def test_a_row_that_lacks_a_column_is_named_among_its_batch(root):
    rows = [sample("rows.jsonl:1", "42", unit="$"), sample("rows.jsonl:2", "42", price=3)]
    table = load_rewards(["my_rewards.py:needs_unit"], root=root).score(batch("42", "42", samples=rows))
    assert table.failures["needs_unit"].first.startswith(
        "rows.jsonl:2: reward needs_unit (my_rewards.py:needs_unit): column 'unit' is asked for, but the row's columns"
    )


def test_a_failure_stops_the_run_where_that_is_asked_for(root):
    rewards = load_rewards(["my_rewards.py:faulty"], root=root, on_error="raise")
    with pytest.raises(
        RewardError,
        match=r"rows\.jsonl:2: reward faulty .*: ZeroDivisionError: division by zero\. 1 of 2 completions have no number "
        r'from it\. Mend it or its rows, .* on_error="count"',
    ) as caught:
        rewards.score(batch("42", "41"))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_batch_of_unequal_lists_is_refused_with_their_lengths():
    with pytest.raises(RewardError, match=r"2 completions, 1 lists of token ids, 2 samples, 2 truncated marks\. Each"):
        RewardBatch(["a", "b"], [[1]], [sample("r:1", "a")] * 2, [False, False])


@pytest.mark.parametrize(
    ("specs", "sentence"),
    [
        ([], r"grpo\.rewards is \[\], but must be a list of at least 1 reward"),
        ("exact", r"grpo\.rewards is 'exact', but must be a list"),
        (
            ["math_box"],
            r"grpo\.rewards\[0\]: there is no reward 'math_box' among math_boxed, .* Did you mean math_boxed\?",
        ),
        ([3], r"grpo\.rewards\[0\] is 3, but must be a name"),
        ([{"weight": 2}], r"grpo\.rewards\[0\] is \{'weight': 2\}, but must be a name"),
        ([{"name": "exact", "weight": "2"}], r"grpo\.rewards\[0\]\.weight is '2', but must be a finite number"),
        ([{"name": "exact", "weight": True}], r"grpo\.rewards\[0\]\.weight is True, but must be a finite number"),
        (["exact", "exact"], r"grpo\.rewards\[1\] is 'exact', and so is grpo\.rewards\[0\].*as: exact_2"),
        (
            [{"name": "anls", "treshold": 0.4}],
            r"anls has no parameter 'treshold' \(set to 0\.4\).* Did you mean threshold\?",
        ),
        (
            [{"name": "anls", "threshold": 4}],
            r"grpo\.rewards\[0\]\.threshold is 4: input should be less than or equal to 1",
        ),
        (
            [{"name": "exact", "read": "box"}],
            r"grpo\.rewards\[0\]\.read is 'box': input should be 'final', 'boxed' or 'text'",
        ),
        (
            ["length"],
            r"grpo\.rewards\[0\]: length needs max_tokens, which is not set\. Write \{name: length, max_tokens: \.\.\.\}",
        ),
        ([{"name": "json_schema", "schema": {"type": "x"}}], r"grpo\.rewards\[0\]\.schema is .* is no JSON Schema"),
        (
            ["my_reward.py:near"],
            r"grpo\.rewards\[0\]: 'my_reward\.py:near' names the file .*my_reward\.py, which is no Python file",
        ),
        (["my_rewards.py:nearer"], r"my_rewards\.py has no function 'nearer'; it has .*near.* Did you mean near\?"),
        (
            [{"name": "my_rewards.py:near", "withn": 2}],
            r"near has no parameter 'withn'; it has .* Did you mean within\?",
        ),
        (["broken.py:f"], r"grpo\.rewards\[0\]: .*broken\.py cannot be run: SyntaxError"),
    ],
)
def test_a_reward_written_wrongly_is_answered_with_a_sentence(root, specs, sentence):
    (root / "broken.py").write_text("def f(:", encoding="utf-8")
    with pytest.raises(ConfigError, match=sentence):
        load_rewards(specs, root=root)


def test_specs_are_read_without_running_anything(tmp_path):
    (spec,) = read_reward_specs([{"name": "none_here.py:f", "weight": 2, "as": "mine", "limit": 3}])
    assert (spec.label, spec.weight, spec.parameters) == ("mine", 2.0, {"limit": 3})


def test_the_guides_extractor_is_exported():
    assert extract_boxed_answer(r"so \boxed{7}") == "7"


def test_the_example_of_the_docs_runs(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "my_rewards.py").write_text(example, encoding="utf-8")
    rewards = load_rewards([{"name": "my_rewards.py:price_match", "within": 0.1}], root=tmp_path)
    rows = [
        sample("rows.jsonl:1", "42.00"),
        sample("rows.jsonl:2", "3"),
        sample("rows.jsonl:3", "7"),
        sample("rows.jsonl:4", "1"),
    ]
    table = rewards.score(batch(r"so \boxed{42.05}", r"\boxed{4}", "seven", r"\boxed{one}", samples=rows))
    assert not table.failures
    np.testing.assert_array_equal(table.values, [[1], [0], [math.nan], [0]])
