"""Answers in texts, edit distance, relaxed numbers and word overlap, against numbers worked by hand."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lensmith.evals.answer_text import after_thought, extract_boxed, final_answer, read_answer
from lensmith.evals.text_metrics import anls, read_number, relaxed_match, repeated_share, token_f1

texts = st.text(max_size=20)
braced = st.recursive(
    st.text("ab \\,", max_size=4).filter(lambda t: not t.endswith("\\")), lambda inner: inner.map("{{{}}}".format)
)


@pytest.mark.parametrize(
    ("text", "held"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\fbox{ 7 } and a stray }", "7"),
        (r"\boxed {x}", "x"),
        (r"first \boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{\boxed{\frac{1}{2}}}", r"\frac{1}{2}"),
        (r"\boxed{\fbox{a}+b}", r"\fbox{a}+b"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a \boxed{b}", "b"),
        (r"\boxed{}", ""),
        (r"\boxed{\frac{1}{2}", None),
        (r"\boxed{1} no, \boxed{2", None),
        (r"\boxed 5", None),
        ("five", None),
        ("", None),
    ],
)
def test_the_last_box_is_read_with_its_braces_balanced(text, held):
    assert extract_boxed(text) == held


@given(braced, texts.filter(lambda t: "\\" not in t and "}" not in t))
def test_what_is_put_in_a_box_is_read_back(held, before):
    assert extract_boxed(f"{before}\\boxed{{{held}}}") == held.strip()


def test_many_boxes_that_never_close_are_read_in_a_moment():
    assert extract_boxed("\\boxed{" * 100_000) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>6 x 7</think> 42", "42"),
        ("begun in the prompt</think>\n42\n", "42"),
        ("<think>a</think><answer>41</answer> or <answer> 42 </answer>", "42"),
        ("<answer>42", "<answer>42"),
        ("<think>42", ""),
        ("42 <think>is it</think>", ""),
        ("42 <think>is it", "42"),
        ("42", "42"),
    ],
)
def test_the_answer_stands_behind_the_thought_and_between_its_tags(text, answer):
    assert final_answer(text) == answer


def test_a_box_inside_the_thought_is_not_the_answer():
    text = r"<think>\boxed{1}</think> it is two"
    assert read_answer(text, "boxed") is None
    assert read_answer(text, "text") == text
    assert after_thought(text) == " it is two"


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("Lensmith", "lensmith ", 1.0),
        ("lens", "lense", 0.8),  # 1 edit in 5
        ("abcd", "abxy", 0.0),  # 2 in 4: exactly half is wrong
        ("abcde", "abcxy", 0.6),  # 2 in 5
        ("kitten", "sitting", 4 / 7),  # Levenshtein's own example: 3 in 7
        ("", "a", 0.0),
        ("", "", 1.0),
    ],
)
def test_anls_is_one_less_the_share_of_edits_below_one_half(answer, reference, score):
    assert anls(answer, reference) == pytest.approx(score, abs=1e-12)


@given(texts, texts)
def test_anls_is_symmetric_and_never_between_nothing_and_half(first, second):
    score = anls(first, second)
    assert score == anls(second, first)
    assert score == 0 or 0.5 < score <= 1
    assert anls(first, first) == 1


@pytest.mark.parametrize(
    ("answer", "reference", "is_right"),
    [
        ("105", "100", True),
        ("95", "100", True),
        ("105.1", "100", False),
        ("-100", "100", False),
        ("0", "0", True),
        ("0.01", "0", False),
        ("5%", "0.05", True),
        ("1,250", "1250.0", True),
        ("$5", "5", True),
        ("−3", "-3", True),
        ("Blue ", "blue", True),
        ("about 100", "100", False),
        ("nan", "nan", True),  # as words
        ("inf", "100", False),
        ("1,25", "125", False),
        ("1.02e3", "1000", True),
        ("1e999", "1e999", True),  # as words
    ],
)
def test_a_number_may_be_off_by_five_percent_of_the_reference(answer, reference, is_right):
    assert relaxed_match(answer, reference) is is_right


@given(st.floats(-1e9, 1e9), st.floats(0, 0.1))
def test_what_is_within_the_tolerance_is_right_and_what_is_beyond_is_wrong(meant, share):
    assume(abs(share - 0.05) > 1e-6)
    assume(meant == 0 or abs(meant) > 1e-290)  # below, multiplying loses digits
    for said in (meant * (1 + share), meant * (1 - share)):
        assert relaxed_match(repr(said), repr(meant)) is (share < 0.05 or meant == 0)


@given(st.text("0123456789,.-+%$ e", max_size=12))
def test_what_reads_as_a_number_is_finite(text):
    number = read_number(text)
    assert number is None or math.isfinite(number)


def test_word_overlap_is_the_f1_of_squad():
    # "the cat sat" -> cat sat; "a cat sat down" -> cat sat down: precision 2/2, recall 2/3.
    assert token_f1("the cat sat", "a cat sat down") == pytest.approx(0.8)
    assert token_f1("dog dog", "dog") == pytest.approx(2 / 3)
    assert token_f1("", "") == 1
    assert token_f1("", "cat") == 0


@given(texts, texts)
def test_word_overlap_is_symmetric_and_full_for_equal_texts(first, second):
    assert token_f1(first, second) == token_f1(second, first)
    assert 0 <= token_f1(first, second) <= 1
    assert token_f1(first, first) == 1


def test_repetition_is_the_share_of_grams_seen_before():
    assert repeated_share([1, 2, 3, 4], 2) == 0
    assert repeated_share([5, 5, 5, 5, 5], 2) == 0.75
    assert repeated_share([1, 2, 1, 2], 2) == pytest.approx(1 / 3)
    assert repeated_share([1], 2) == 0
    assert repeated_share([], 1) == 0


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 4))
def test_repetition_is_a_share(tokens, ngram):
    assert 0 <= repeated_share(tokens, ngram) < 1
