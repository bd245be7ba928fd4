"""Intervals and paired tests, against enumeration, coverage and each other."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lensmith.evals.intervals import (
    CONFIDENCE,
    bootstrap_interval,
    mcnemar_p_value,
    newcombe_interval,
    resampled_means,
    sign_flip_p_value,
    statistic_interval,
)


def test_sign_flips_of_right_and_wrong_are_mcnemars_test():
    for wins, losses in itertools.product(range(6), repeat=2):
        differences = np.array([1.0] * wins + [-1.0] * losses + [0.0] * 3)
        assert sign_flip_p_value(differences) == pytest.approx(mcnemar_p_value(wins, losses), abs=1e-12)


def test_few_pairs_are_counted_in_every_pattern_of_signs():
    differences = [0.3, 0.1, -0.2, 0.25]
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in itertools.product((-1, 1), repeat=4)
    ]
    expected = sum(abs(total) >= abs(sum(differences)) - 1e-12 for total in sums) / 16
    assert sign_flip_p_value(np.array(differences)) == expected


def test_drawn_sign_flips_come_near_the_normal_approximation_and_never_to_zero():
    generator = np.random.default_rng(0)
    differences = generator.normal(0.05, 0.3, 300)
    z = abs(differences.sum()) / math.sqrt((differences**2).sum())
    assert sign_flip_p_value(differences) == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.01)
    assert sign_flip_p_value(differences) == sign_flip_p_value(differences), "the same answers give the same p"
    assert 0 < sign_flip_p_value(np.full(300, 0.5)) < 1.01e-4


def test_no_difference_is_no_evidence():
    assert sign_flip_p_value(np.zeros(5)) == 1
    assert sign_flip_p_value(np.full(5, 1e-12)) == 1


def test_flipping_all_differences_changes_no_p_value():
    differences = np.random.default_rng(3).normal(0.1, 1, 40)
    assert sign_flip_p_value(differences, seed=1) == sign_flip_p_value(-differences, seed=1)


def test_bootstrap_of_many_values_agrees_with_the_normal_interval():
    values = np.random.default_rng(1).beta(4, 3, 400)
    error = 1.959964 * values.std(ddof=1) / math.sqrt(400)
    low, high = bootstrap_interval(values)
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.05 * error)
    assert bootstrap_interval(values) == (low, high), "seeded"
    assert bootstrap_interval(values, seed=1) != (low, high)


def test_bootstrap_leans_where_the_values_are_skewed():
    """BCa reaches further towards the tail than the percentile interval does (Efron and Tibshirani 1993, 14.3)."""
    values = np.random.default_rng(2).exponential(1, 60)
    low, high = bootstrap_interval(values)
    plain_low, plain_high = np.quantile(resampled_means(values, 0), [0.025, 0.975])
    assert low > plain_low
    assert high > plain_high


def test_values_without_spread_have_the_mean_at_both_ends():
    assert bootstrap_interval(np.full(9, 0.25)) == (0.25, 0.25)
    assert bootstrap_interval(np.array([0.7])) == (0.7, 0.7)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_bootstrap_stays_within_the_values(values):
    low, high = bootstrap_interval(np.array(values))
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9


def test_resamples_of_many_questions_are_drawn_in_pieces_of_the_same_kind(monkeypatch):
    monkeypatch.setattr("lensmith.evals.intervals.CHUNK", 100)
    means = resampled_means(np.arange(40.0), seed=0, resamples=501)
    assert means.shape == (501,)
    assert means.mean() == pytest.approx(19.5, abs=0.4)
    assert 0 < sign_flip_p_value(np.linspace(-1, 1.5, 60)) < 0.2


def test_newcombe_interval_covers_as_often_as_it_says():
    """Exact coverage over every table of 30 pairs; method 10 keeps to its level on average (Newcombe 1998, table IV)."""
    n = 30
    tables = [(a, b, c, n - a - b - c) for a in range(n + 1) for b in range(n + 1 - a) for c in range(n + 1 - a - b)]
    logs = [math.lgamma(k + 1) for k in range(n + 1)]
    bounds = [newcombe_interval(*table) for table in tables]
    covered = []
    for shares in ((0.5, 0.2, 0.1, 0.2), (0.7, 0.1, 0.1, 0.1), (0.3, 0.3, 0.05, 0.35), (0.25, 0.25, 0.25, 0.25)):
        difference = shares[1] - shares[2]
        chances = [
            math.exp(logs[n] + sum(k * math.log(p) - logs[k] for k, p in zip(table, shares, strict=True)))
            for table in tables
        ]
        assert sum(chances) == pytest.approx(1)
        covered.append(sum(c for c, (low, high) in zip(chances, bounds, strict=True) if low <= difference <= high))
    assert min(covered) > 0.93
    assert np.mean(covered) == pytest.approx(CONFIDENCE, abs=0.015)


def test_newcombe_interval_is_inside_its_bounds_and_turns_round_with_its_pairs():
    for table in [(0, 5, 0, 0), (5, 0, 0, 0), (3, 0, 2, 9), (0, 0, 0, 4), (10, 7, 1, 3), (500, 0, 0, 0)]:
        both, gained, lost, neither = table
        low, high = newcombe_interval(*table)
        assert -1 <= low <= (gained - lost) / sum(table) <= high <= 1
        assert low < high, "even without a pair that differs"
        assert newcombe_interval(both, lost, gained, neither) == pytest.approx((-high, -low))


def test_a_statistic_that_is_the_mean_has_the_percentile_interval_of_the_mean():
    values = np.random.default_rng(5).random(50)
    found = statistic_interval(lambda chosen: float(values[chosen].mean()), 50, resamples=4000)
    assert found == pytest.approx(np.quantile(resampled_means(values, 9), [0.025, 0.975]), abs=0.01)
