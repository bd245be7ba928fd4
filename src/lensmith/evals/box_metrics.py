"""How well boxes and points agree, pure: corners x1, y1, x2, y2 on any one scale, such as Qwen3-VL's 0 to 1000.

Intersection over union does not change when an axis is stretched, so boxes in shares of the picture and in thousandths
of it score the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Numbers = Sequence[float]


def box_iou(first: Numbers, second: Numbers) -> float:
    """Intersection over union of two boxes, 0 to 1; a box without area, or with its corners swapped, has none.

    Everingham et al. 2010, The Pascal VOC Challenge, section 4.2, over areas and not pixels counted with both edges.
    """
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = _area(first) + _area(second) - shared
    return shared / union if shared and union > 0 else 0.0


def matched_iou(boxes: Sequence[Numbers], references: Sequence[Numbers]) -> float:
    """IoU summed over the best one-to-one matching, divided by the longer of the two lists: range 0 to 1, symmetric.

    A box too many costs as much as one too few, so that neither listing everything nor saying little pays. Two empty
    lists agree.
    """
    if not boxes or not references:
        return float(len(boxes) == len(references))
    ious = np.array([[box_iou(one, other) for other in references] for one in boxes])
    return float(sum(ious[row, column] for row, column in match_best(ious)) / max(ious.shape))


def match_best(gains: np.ndarray) -> list[tuple[int, int]]:
    """Row and column of each pair of the one-to-one matching with the largest sum of gains, rows ascending.

    Args:
        gains: [rows, columns], finite. Each row gets one column, or each column one row where rows are more.

    The Hungarian method by shortest augmenting paths (Jonker and Volgenant 1987, Computing 38), rows^2 x columns steps;
    exact for every size.
    """
    if gains.shape[0] > gains.shape[1]:
        return sorted((row, column) for column, row in match_best(gains.T))
    num_rows, num_columns = gains.shape
    # Index 0 is a place-holder: the row that is being placed starts from column 0.
    cost = np.zeros((num_rows + 1, num_columns + 1))
    cost[1:, 1:] = -gains
    row_price, column_price = np.zeros(num_rows + 1), np.zeros(num_columns + 1)
    row_of = np.zeros(num_columns + 1, dtype=int)
    for row in range(1, num_rows + 1):
        row_of[0] = row
        _place(cost, row_price, column_price, row_of)
    return sorted((int(row_of[column]) - 1, column - 1) for column in range(1, num_columns + 1) if row_of[column])


def _place(cost: np.ndarray, row_price: np.ndarray, column_price: np.ndarray, row_of: np.ndarray) -> None:
    """Give the row in row_of[0] a column along the cheapest path; prices and row_of are changed in place."""
    slack = np.full(len(column_price), np.inf)
    came_from = np.zeros(len(column_price), dtype=int)
    done = np.zeros(len(column_price), dtype=bool)
    column = 0
    while row_of[column]:
        done[column] = True
        row = row_of[column]
        reduced = cost[row] - row_price[row] - column_price
        better = ~done & (reduced < slack)
        slack[better], came_from[better] = reduced[better], column
        nearest = int(np.argmin(np.where(done, np.inf, slack)))
        step = slack[nearest]
        row_price[row_of[done]] += step
        column_price[done] -= step
        slack[~done] -= step
        column = nearest
    while column:
        row_of[column] = row_of[came_from[column]]
        column = came_from[column]


def contains_point(box: Numbers, point: Numbers) -> bool:
    """Whether the point lies in the box, edges included."""
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def centre_of(box: Numbers) -> tuple[float, float]:
    """x, y of the middle; a point of two numbers is its own."""
    if len(box) == 2:
        return box[0], box[1]
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _area(box: Numbers) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)
