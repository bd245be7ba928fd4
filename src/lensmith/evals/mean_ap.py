"""Mean average precision of boxes with labels, by pycocotools: a number of a whole data set, not of one answer.

pycocotools matches the boxes of each picture once (`COCOeval.evaluate`). What it keeps per picture is then put together for
any selection of pictures (`COCOeval.accumulate`), which is what subsets, resamples and swapped pairs need.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lensmith.config.tree import BoxConvention
from lensmith.data.box_text import find_boxes, read_confidence, read_label
from lensmith.data.boxes import corners_of
from lensmith.errors import DataError

if TYPE_CHECKING:
    from jaxtyping import Int

MOST_BOXES = 100
"""Of one picture that count, the surest first: COCO's limit."""
EVERY_AREA = (0.0, 1e12)
"""COCO's small, medium and large are areas in pixels; a scale from 0 to 1000 has none."""

Labelled = tuple[str, tuple[float, ...], float]
"""What a box shows, its corners, and how sure the answer is."""


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
        self._judge = _matched(said, meant)
        self._pictures = len(references)
        # pycocotools lists what it found label by label, and for each label picture by picture.
        self._found = np.array(self._judge.evalImgs, dtype=object).reshape(-1, self._pictures)

    def value(self, chosen: Int[np.ndarray, " pictures"]) -> float:
        """AP of these pictures, each perhaps several times, averaged over the labels that their references hold; 0 to 1.

        nan where they hold none.
        """
        judge = self._judge
        judge.params.imgIds = judge._paramsEval.imgIds = list(range(len(chosen)))
        judge.evalImgs = self._found[:, chosen].ravel().tolist()
        with contextlib.redirect_stdout(io.StringIO()):
            judge.accumulate()
        precision = judge.eval["precision"]
        known = precision[precision > -1]  # -1: a label without references
        return float(known.mean()) if known.size else float("nan")


def _read(text: str, convention: BoxConvention) -> list[Labelled]:
    found = []
    for span in find_boxes(text, bare=True):
        if span.kind == "box":
            confidence = read_confidence(text, span)
            label = " ".join(read_label(text, span).casefold().split())
            found.append((label, corners_of(span.numbers, convention), 1.0 if confidence is None else confidence))
    return found


def _matched(said: Sequence[Sequence[Labelled]], meant: Sequence[Sequence[Labelled]]) -> Any:
    """A COCOeval that has matched every picture's boxes."""
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
    return judge


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
