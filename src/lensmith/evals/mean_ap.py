"""Mean average precision of boxes with labels: a number of a whole data set, not of one answer.

pycocotools matches the boxes of each picture (`COCOeval.evaluate`), once. The curve is then drawn here for any selection of
pictures, in a fifth of the time of `COCOeval.accumulate`: an interval needs hundreds of them. tests/reference/test_mean_ap.py
holds it to pycocotools' own number.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lensmith.config.tree import BoxConvention
from lensmith.data.box_text import find_boxes, read_confidence, read_label
from lensmith.data.boxes import corners_of
from lensmith.errors import DataError

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

MOST_BOXES = 100
"""Of one picture that count, the surest first: COCO's limit."""
EVERY_AREA = (0.0, 1e12)
"""COCO's small, medium and large are areas in pixels; a scale from 0 to 1000 has none."""

RECALLS = np.linspace(0, 1, 101)
"""Where COCO reads the curve."""

Labelled = tuple[str, tuple[float, ...], float]
"""What a box shows, its corners, and how sure the answer is."""


@dataclass(frozen=True, slots=True)
class _Label:
    """All boxes of one label, the surest first."""

    hits: Bool[np.ndarray, "thresholds boxes"]
    """Whether each box of an answer found one of the references, by IoU threshold."""
    pictures: Int[np.ndarray, " boxes"]
    """Where it was said."""
    truths: Int[np.ndarray, " pictures"]
    """Boxes of the references in each picture."""

    def precision(self, times: Int[np.ndarray, " pictures"]) -> float:
        """Area under the interpolated curve, averaged over thresholds, with each picture as often as `times` says."""
        weights = times[self.pictures]
        right = (self.hits * weights).cumsum(axis=1)
        recall = right / (times @ self.truths)
        precision = right / np.maximum(weights.cumsum(), 1)
        # Precision at a recall is the best one at that recall or beyond; 0 behind the end of the curve.
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        best = np.pad(best, ((0, 0), (0, 1)))
        places = [np.searchsorted(one, RECALLS, side="left") for one in recall]
        return float(np.take_along_axis(best, np.array(places), axis=1).mean())


class AveragePrecision:
    """AP@[.5:.95] of any selection of answers: https://cocodataset.org/#detection-eval, Lin et al., arXiv:1405.0312.

    Boxes without a `confidence` beside them count as sure (1), as language models are usually evaluated; ties go in the
    order in which they are written. Labels are compared without case.
    """

    def __init__(self, answers: Sequence[str], references: Sequence[str], conventions: Sequence[BoxConvention]) -> None:
        """One answer, reference and convention per picture.

        Raises:
            DataError: no reference holds a box.
        """
        said, meant = (
            [_read(text, convention) for text, convention in zip(texts, conventions, strict=True)]
            for texts in (answers, references)
        )
        if not any(meant):
            raise DataError(
                f"eval.metric=map: 0 boxes in {len(references):,} references, and at least 1 is needed to compare with. "
                "Write boxes as docs/boxes.md shows, or set eval.metric=auto."
            )
        self._pictures = len(references)
        # pycocotools lists what it found label by label, and for each label picture by picture.
        found = _matched(said, meant)
        rows = [found[start : start + self._pictures] for start in range(0, len(found), self._pictures)]
        self._labels = [_sorted(row) for row in rows]

    def value(self, chosen: Int[np.ndarray, " pictures"]) -> float:
        """AP of these pictures, each perhaps several times, averaged over the labels that their references hold; 0 to 1.

        nan where they hold none.
        """
        times = np.bincount(chosen, minlength=self._pictures)
        known = [label.precision(times) for label in self._labels if times @ label.truths]
        return sum(known) / len(known) if known else float("nan")


def _sorted(found: Sequence[dict[str, Any] | None]) -> _Label:
    """One label from what pycocotools found in each picture; None stands for a picture without it."""
    held = [(number, one) for number, one in enumerate(found) if one is not None]
    scores = np.concatenate([one["dtScores"] for _, one in held])
    order = np.argsort(-scores, kind="stable")
    hits = np.concatenate([one["dtMatches"] for _, one in held], axis=1)[:, order] > 0
    pictures = np.repeat([number for number, _ in held], [len(one["dtScores"]) for _, one in held])[order]
    return _Label(hits, pictures, np.array([0 if one is None else len(one["gtIds"]) for one in found]))


def _read(text: str, convention: BoxConvention) -> list[Labelled]:
    found = []
    for span in find_boxes(text, bare=True):
        if span.kind == "box":
            confidence = read_confidence(text, span)
            label = " ".join(read_label(text, span).casefold().split())
            found.append((label, corners_of(span.numbers, convention), 1.0 if confidence is None else confidence))
    return found


def _matched(said: Sequence[Sequence[Labelled]], meant: Sequence[Sequence[Labelled]]) -> list[Any]:
    """What COCOeval found, label by label and picture by picture."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    labels = sorted({label for boxes in (*said, *meant) for label, _, _ in boxes})
    numbers = {label: number for number, label in enumerate(labels, start=1)}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress there
        judge = COCOeval(_coco(COCO, meant, numbers), _coco(COCO, said, numbers), "bbox")
        judge.params.areaRng, judge.params.areaRngLbl = [list(EVERY_AREA)], ["all"]
        judge.params.maxDets = [MOST_BOXES]
        judge.params.imgIds, judge.params.catIds = list(range(len(meant))), list(numbers.values())
        judge.evaluate()
    return judge.evalImgs


def _coco(kind: Any, pictures: Sequence[Sequence[Labelled]], numbers: dict[str, int]) -> Any:
    """The boxes of all pictures in COCO's form."""
    dataset = kind()
    boxes = [
        (picture, label, corners, confidence)
        for picture, held in enumerate(pictures)
        for label, corners, confidence in held
    ]
    dataset.dataset = {
        "images": [{"id": picture} for picture in range(len(pictures))],
        "categories": [{"id": number, "name": label} for label, number in numbers.items()],
        "annotations": [
            {
                "id": number,
                "image_id": picture,
                "category_id": numbers[label],
                "bbox": [x1, y1, max(x2 - x1, 0), max(y2 - y1, 0)],
                "area": max(x2 - x1, 0) * max(y2 - y1, 0),
                "iscrowd": 0,
                "score": confidence,
            }
            for number, (picture, label, (x1, y1, x2, y2), confidence) in enumerate(boxes, start=1)
        ],
    }
    dataset.createIndex()
    return dataset
