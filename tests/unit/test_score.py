"""Scores, their intervals and comparisons, against hand-made and published numbers."""

import itertools
import math

import pytest

from lensmith.errors import DataError
from lensmith.evals.score import (
    compare_answers,
    exact_match,
    guess_metric,
    mcnemar_p_value,
    normalise,
    normalised_match,
    score_answers,
    wilson_interval,
)


def test_exact_match_ignores_white_space_at_the_ends_only():
    assert exact_match(" teal\n", "teal")
    assert not exact_match("Teal", "teal")
    assert not exact_match("light  blue", "light blue")


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The two dogs.", "2 dogs"),
        ("YES!", "yes"),
        ("an apple, a pear", "apple pear"),
        ("none", "0"),
        ("it's Tom’s", "its toms"),
        ("T-shirt", "t shirt"),
        ("1,250,000", "1250000"),
        ("1,2", "1,2"),
        ("50%", "50%"),
        ("ＹＥＳ。", "yes"),
        ("", ""),
    ],
)
def test_normalise_takes_away_what_the_vqa_evaluation_takes_away(text, plain):
    assert normalise(text) == plain
    assert normalise(plain) == plain, "normalising twice changes nothing"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("-5", "5"),
        ("0.5", "5"),
        (".5", "5"),
        ("1/2", "12"),
        ("10:30", "1030"),
        ("3-5", "35"),
        ("a < b", "a > b"),
        ("5%", "5"),
    ],
)
def test_normalising_keeps_different_numbers_different(one, other):
    assert not normalised_match(one, other)


def test_a_choice_that_is_an_article_is_still_an_answer():
    assert normalised_match("A.", "a")
    assert not normalised_match("", "A")
    assert not normalised_match("the", "A")
    assert not normalised_match("?", "!")


def test_score_is_the_share_of_matches_with_its_interval():
    score = score_answers(["Yes.", "no", "red", "2"], ["yes", "no", "blue", "two"], "normalised")
    assert (score.metric, score.value, score.n) == ("normalised", 0.75, 4)
    assert score_answers(["Yes.", "no", "red", "2"], ["yes", "no", "blue", "two"], "exact").value == 0.25
    assert str(score) == "75.0% (30.1% to 95.4%, n=4)"


def test_wilson_interval_agrees_with_published_values():
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3: to four decimals.
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (right, n), bounds in published.items():
        assert wilson_interval(right, n) == pytest.approx(bounds, abs=5e-5)


def test_wilson_interval_is_where_the_score_test_rejects():
    """Its definition: both bounds lie CONFIDENCE's z standard errors, under themselves, from the share."""
    for right, n in [(1, 7), (600, 1000), (997, 1000)]:
        for bound in wilson_interval(right, n):
            assert abs(right / n - bound) / math.sqrt(bound * (1 - bound) / n) == pytest.approx(1.959963985)


def test_wilson_interval_stays_between_zero_and_one():
    for n in (1, 3, 10, 1000):
        assert wilson_interval(0, n)[0] == 0
        assert wilson_interval(n, n)[1] == 1


def test_mcnemar_counts_every_outcome_of_a_fair_coin():
    for wins, losses in itertools.product(range(6), repeat=2):
        n = wins + losses
        outcomes = [sum(coins) for coins in itertools.product((0, 1), repeat=n)]
        as_uneven = sum(abs(2 * heads - n) >= abs(wins - losses) for heads in outcomes)
        assert mcnemar_p_value(wins, losses) == pytest.approx(as_uneven / 2**n, abs=0)


def test_mcnemar_of_many_pairs_neither_overflows_nor_hangs():
    assert mcnemar_p_value(5000, 5000) == 1
    assert mcnemar_p_value(9000, 0) == 0
    assert mcnemar_p_value(600, 2) == pytest.approx(2 * (1 + 602 + 602 * 601 / 2) / 2**602)


def test_comparison_counts_pairs_not_totals():
    compared = compare_answers(["a", "x", "c", "x"], ["a", "b", "x", "d"], ["a", "b", "c", "d"], "exact")
    assert (compared.wins, compared.losses, compared.ties) == (2, 1, 1)
    assert compared.p_value == 1
    assert compared.sentence == (
        "Of 4 questions, 2 wrong answers became right and 1 right ones became wrong (p = 1, McNemar's exact test)."
    )


def test_answers_and_references_of_unequal_number_are_refused_with_both_numbers():
    with pytest.raises(DataError, match=r"scoring: 1 answers for 2 references.*data\.test"):
        score_answers(["yes"], ["yes", "no"], "exact")
    with pytest.raises(DataError, match=r"scoring: 0 answers for 0 references"):
        score_answers([], [], "exact")


def test_metric_is_guessed_from_the_answers_and_says_why():
    assert guess_metric(["yes", "no", "two dogs"]) == (
        "normalised",
        "metric normalised: short answers (half have 1 or fewer words), compared without case, punctuation and articles",
    )
    name, sentence = guess_metric(["<b>7</b>", "x = 1\ny = 2", "7"])
    assert name == "exact"
    assert "2 of 3 answers are code, markup or several lines" in sentence
    with pytest.raises(DataError, match="0 references"):
        guess_metric([])
