"""Boxes and points as answers hold them, and how well they agree: texts in, one number out, pure.

An answer and its reference are written in one convention, which says what the four numbers mean; intersection over union
does not change when an axis is stretched, so the scale need not be known.
"""

from __future__ import annotations

import re

import numpy as np

from lensmith.config.tree import BoxConvention
from lensmith.data.box_text import NUMBER, Kind, find_boxes
from lensmith.data.boxes import corners_of
from lensmith.evals.box_metrics import box_iou, centre_of, contains_point, match_best, matched_iou

PLAIN: BoxConvention = "xyxy_1000"
"""What Qwen3-VL writes: corners."""

_PAIR = re.compile(rf"\s*[\[(]\s*{NUMBER.pattern}\s*,\s*{NUMBER.pattern}\s*[\])]\s*")


def read_marked(text: str, kind: Kind, convention: BoxConvention = PLAIN) -> list[tuple[float, ...]]:
    """Boxes as corners, or points, that a text holds in any writing of docs/boxes.md; a whole text of numbers is boxes."""
    return [corners_of(span.numbers, convention) for span in find_boxes(text, bare=True) if span.kind == kind]


def read_targets(text: str, convention: BoxConvention = PLAIN) -> list[tuple[float, ...]]:
    """Points, then boxes; a whole text `[x, y]` or `(x, y)` is a point."""
    said = [*read_marked(text, "point", convention), *read_marked(text, "box", convention)]
    if not said and _PAIR.fullmatch(text):
        said = [tuple(float(match[0]) for match in NUMBER.finditer(text))]
    return said


def answer_iou(answer: str, reference: str, convention: BoxConvention = PLAIN) -> float:
    """`matched_iou` of the boxes in two texts; range 0 to 1. Two texts without boxes agree; labels do not count."""
    return matched_iou(read_marked(answer, "box", convention), read_marked(reference, "box", convention))


def answer_hits(answer: str, reference: str, threshold: float, convention: BoxConvention = PLAIN) -> float:
    """Pairs of boxes with an IoU of `threshold` or more, divided by the longer of the two lists; range 0 to 1.

    As many pairs as a one-to-one matching allows. With one box each this is the accuracy of grounding (RefCOCO's Acc@0.5).
    """
    boxes, references = read_marked(answer, "box", convention), read_marked(reference, "box", convention)
    if not boxes or not references:
        return float(len(boxes) == len(references))
    hits = np.array([[float(box_iou(one, other) >= threshold) for other in references] for one in boxes])
    return float(sum(hits[row, column] for row, column in match_best(hits)) / max(hits.shape))


def point_hit(answer: str, reference: str, convention: BoxConvention = PLAIN) -> bool:
    """Whether the one point in the answer, or the middle of its one box, lies in one of the reference's boxes.

    ScreenSpot's click accuracy, arXiv:2401.10935 (SeeClick), section 4.

    Raises:
        ValueError: the reference holds no box.
    """
    boxes = read_marked(reference, "box", convention)
    if not boxes:
        raise ValueError(f"the reference {reference[:60]!r} holds 0 boxes, and a point needs at least 1 to lie in")
    said = read_targets(answer, convention)
    return len(said) == 1 and any(contains_point(box, centre_of(said[0])) for box in boxes)
