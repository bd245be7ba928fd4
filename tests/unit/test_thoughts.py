"""Thoughts stay in answers or are taken out, as the setting says; either way they are counted."""

import json

import pytest

from lensmith.config.tree import Data
from lensmith.data.source import read_samples
from lensmith.data.thoughts import drop_thoughts
from lensmith.errors import RowError


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("42", "42"),
        ("<think>six times seven</think>\n\n42", "42"),
        ("<think>\na\nb\n</think> 42 <think>sure?</think> yes", "42 yes"),
        ("six times seven</think>\n42", "42"),
        ("<think></think>42", "42"),
        ("  42 <think>x</think>", "  42 "),
        ("<thinking>42</thinking>", "<thinking>42</thinking>"),
    ],
)
def test_thoughts_go_with_the_white_space_behind_them(answer, said):
    assert drop_thoughts([answer], "r:1") == [said]


@pytest.mark.parametrize(
    ("answer", "code", "sentence"),
    [
        ("<think>six times seven", "malformed_row", "a <think> that is never closed"),
        ("<think>a<think>b</think>c</think>d", "malformed_row", "a </think> that is never opened"),
        ("<think>only this</think> \n", "empty_answer", "is all thought (26 characters)"),
    ],
)
def test_thoughts_that_cannot_be_taken_out_have_sentences(answer, code, sentence):
    with pytest.raises(RowError) as caught:
        drop_thoughts([answer], "r:1")
    assert caught.value.code == code
    assert sentence in str(caught.value)
    assert "data.reasoning=keep" in str(caught.value)


def test_the_setting_changes_answers_only(tmp_path):
    turns = [
        {"role": "user", "content": "What does <think>x</think> mean?"},
        {"role": "assistant", "content": "<think>hm</think> A thought."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": [{"type": "text", "text": "<think>oh</think>"}, {"type": "text", "text": "No."}]},
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}))
    kept = read_samples(tmp_path / "rows.jsonl")[0]
    assert [message.text for message in kept.messages[1::2]] == ["<think>hm</think> A thought.", "<think>oh</think>No."]
    dropped = read_samples(Data(train=str(tmp_path / "rows.jsonl"), reasoning="drop"))[0]
    assert [message.text for message in dropped.messages] == [turns[0]["content"], "A thought.", "And?", "No."]
    assert (kept.thoughts, dropped.thoughts) == (2, 2)
