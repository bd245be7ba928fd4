"""Whether two answers are the same mathematics: pairs known to be equal or not, words, and what runs away."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lensmith.evals import math_answers, math_process
from lensmith.evals.math_answers import math_equal

FORMULAS = [
    (r"\sqrt{12}", r"2\sqrt{3}", True),
    ("(x+1)^2", "x^2+2x+1", True),
    ("3", "x=3", True),
    (r"30", r"30^\circ", True),
    (r"\{2,1\}", r"\{1,2\}", True),
    ("(1,2)", "[1,2]", False),
    ("(2,1)", "(1,2)", False),
    ("x/1", "x-1", False),
]
PLAIN = [
    ("0.5", "1/2", True),
    (r"\frac{1}{2}", "0.5", True),
    (r"-\frac{3}{4}", "-0.75", True),
    ("1,250", "1250.0", True),
    ("$5$", "5", True),
    (r"\text{B}", "B", True),
    (r"\boxed{7}", "7", True),
    ("x + 1", "x+1", True),
    ("1 2", "12", False),
    ("1 1/2", "11/2", False),
    ("0.333", "1/3", False),
    ("1/0", "1", False),
    ("5", "10", False),
    ("A", "B", False),
    ("", "5", False),
]
WORDS = [
    ("The Eiffel Tower.", "eiffel tower", True),
    ("two dogs", "2 dogs", True),
    ("Yes", "yes", True),
    ("post", "stop", False),  # to sympy, products of the same letters
    ("Tokyo", "Kyoto", False),
]


@pytest.fixture
def forgetful():
    """Outcomes of other tests are not remembered."""
    math_equal.cache_clear()
    math_answers._has_math_verify.cache_clear()
    yield
    math_equal.cache_clear()
    math_answers._has_math_verify.cache_clear()


@pytest.mark.parametrize(("answer", "reference", "is_equal"), FORMULAS + PLAIN + WORDS)
def test_answers_are_compared_as_mathematics_and_words_as_words(answer, reference, is_equal):
    assert math_equal(answer, reference) is is_equal


@given(st.integers(-(10**6), 10**6), st.integers(1, 10**4))
def test_a_fraction_is_itself_however_it_is_written(over, under):
    sign, size = "-" if over < 0 else "", abs(over)
    assert math_equal(f"{over}/{under}", f"{sign}\\frac{{{size}}}{{{under}}}")
    assert math_equal(f"{over * 3}/{under * 3}", f"{over}/{under}")
    assert not math_equal(f"{over}/{under}", f"{over + 1}/{under}")


RUNAWAYS = ["9^{9^{9^9}}", "99999999!", "(x+1)^{100000}", r"\binom{999999999}{444444444}"]


@pytest.mark.parametrize("answer", RUNAWAYS)
def test_an_answer_that_runs_away_is_wrong_within_seconds(answer, forgetful):
    start = time.monotonic()
    assert not math_equal(answer, "5")
    assert time.monotonic() - start < math_process.MOST_WAIT_S  # on a busy machine; the process may have to start first


def test_after_a_runaway_formulas_are_compared_as_before(forgetful):
    assert not math_equal("9^{9^{9^9}}", "5")
    assert math_equal(r"\sqrt{12}", r"2\sqrt{3}")


def test_threads_take_turns(forgetful):
    pairs = [(f"{n}+x", f"x+{n}") for n in range(20)] + [(f"{n}+x", f"x-{n}") for n in range(1, 20)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda pair: math_equal(*pair), pairs))
    assert found == [True] * 20 + [False] * 19


def test_without_math_verify_numbers_are_compared_and_that_is_said_once(forgetful, monkeypatch):
    monkeypatch.setattr(math_answers, "find_spec", lambda name: None)
    pairs = [*PLAIN, *WORDS, (r"\sqrt{12}", r"2\sqrt{3}", False), (r"\sqrt{27}", r"3\sqrt{3}", False)]
    with pytest.warns(UserWarning, match="not installed, so answers are compared as numbers and as text") as told:
        found = [math_equal(answer, reference) for answer, reference, _ in pairs]
    assert found == [is_equal for *_, is_equal in pairs]
    assert len(told) == 1


def test_an_answer_of_many_pages_is_compared_as_text(forgetful):
    long = "x+" * 5000 + "x"
    assert math_equal(long, long)
    assert not math_equal(long, "5001x")
