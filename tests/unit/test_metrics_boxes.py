"""Overlap and matching of boxes, against areas worked by hand and every matching there is."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lensmith.evals.box_metrics import box_iou, centre_of, contains_point, match_best, matched_iou

numbers = st.integers(0, 1000)
boxes = st.tuples(numbers, numbers, numbers, numbers).map(
    lambda n: (min(n[0], n[2]), min(n[1], n[3]), max(n[0], n[2]) + 1, max(n[1], n[3]) + 1)
)
LEFT, RIGHT = (0, 0, 10, 10), (5, 0, 15, 10)


def test_iou_is_shared_area_over_united_area():
    assert box_iou(LEFT, RIGHT) == pytest.approx(50 / 150)
    assert box_iou((0, 0, 10, 10), (2, 2, 4, 4)) == pytest.approx(4 / 100)
    assert box_iou(LEFT, (10, 0, 20, 10)) == 0  # only an edge in common
    assert box_iou(LEFT, (20, 20, 30, 30)) == 0


def test_a_box_without_area_or_with_swapped_corners_overlaps_nothing():
    assert box_iou((5, 5, 5, 5), (5, 5, 5, 5)) == 0
    assert box_iou((10, 10, 0, 0), LEFT) == 0


@given(boxes, boxes, st.floats(0.01, 100), st.floats(0.01, 100))
def test_iou_is_symmetric_in_range_and_blind_to_the_scale_of_an_axis(first, second, across, down):
    overlap = box_iou(first, second)
    assert overlap == box_iou(second, first)
    assert 0 <= overlap <= 1
    assert box_iou(first, first) == 1
    scale = np.array([across, down, across, down])
    assert box_iou(scale * first, scale * second) == pytest.approx(overlap, abs=1e-9)


@given(arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(1, 5)), elements=st.floats(-1, 1)))
def test_the_matching_has_the_largest_sum_of_all(gains):
    pairs = match_best(gains)
    rows, columns = gains.shape
    turned = gains if rows <= columns else gains.T
    best = max(
        sum(turned[row, column] for row, column in enumerate(chosen))
        for chosen in permutations(range(turned.shape[1]), turned.shape[0])
    )
    assert len(pairs) == min(rows, columns)
    assert len({row for row, _ in pairs}) == len({column for _, column in pairs}) == len(pairs)
    assert sum(gains[pair] for pair in pairs) == pytest.approx(best, abs=1e-12)


def test_the_best_matching_is_not_the_greedy_one():
    # Greedy takes 0.9 and is left with 0: 0.9 in all; the best is 0.8 + 0.7.
    assert match_best(np.array([[0.9, 0.8], [0.7, 0.0]])) == [(0, 1), (1, 0)]


def test_a_box_too_many_costs_as_much_as_one_too_few():
    assert matched_iou([RIGHT, LEFT], [LEFT, RIGHT]) == 1
    assert matched_iou([LEFT], [LEFT, (50, 50, 60, 60)]) == 0.5
    assert matched_iou([LEFT, (50, 50, 60, 60)], [LEFT]) == 0.5
    assert matched_iou([LEFT, LEFT], [LEFT]) == 0.5
    assert matched_iou([], [LEFT]) == 0
    assert matched_iou([], []) == 1


@given(st.lists(boxes, max_size=6), st.lists(boxes, max_size=6), st.randoms(use_true_random=False))
def test_matched_iou_is_symmetric_in_range_and_blind_to_order(first, second, random):
    score = matched_iou(first, second)
    assert 0 <= score <= 1
    assert score == pytest.approx(matched_iou(second, first), abs=1e-12)
    shuffled = random.sample(first, len(first))
    assert score == pytest.approx(matched_iou(shuffled, second), abs=1e-12)
    assert matched_iou(shuffled, first) == pytest.approx(1)


def test_hundreds_of_boxes_are_matched_in_a_moment():
    many = [(x, y, x + 9, y + 9) for x in range(0, 1000, 50) for y in range(0, 1000, 50)]
    assert matched_iou(many[::-1], many[:20]) == pytest.approx(20 / 400)


def test_edges_belong_to_a_box():
    assert contains_point(LEFT, (10, 0))
    assert not contains_point(LEFT, (10.1, 0))
    assert centre_of((0, 0, 10, 20)) == (5, 10)
    assert centre_of((3, 4)) == (3, 4)
