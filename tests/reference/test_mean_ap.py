"""Mean average precision against pycocotools' own walk from files, and against curves worked by hand."""

import contextlib
import io

import numpy as np
import pytest

from lensmith.errors import DataError
from lensmith.evals.mean_ap import AveragePrecision
from lensmith.evals.score import compare_answers, score_answers


def box(corners, label="cat", confidence=None):
    told = "" if confidence is None else f', "confidence": {confidence}'
    return f'{{"bbox_2d": {[float(n) for n in corners]}, "label": "{label}"{told}}}'


def ap(answers, references):
    return AveragePrecision(answers, references, ["xyxy_1000"] * len(answers)).value(np.arange(len(answers)))


SQUARE, FAR = (0, 0, 100, 100), (500, 500, 600, 600)


def test_average_precision_by_hand():
    assert ap([box(SQUARE)], [box(SQUARE)]) == pytest.approx(1)
    assert ap(["nothing"], [box(SQUARE)]) == 0
    assert ap([box(SQUARE, "dog")], [box(SQUARE)]) == 0
    assert ap([box(SQUARE, "Cat ")], [box(SQUARE)]) == pytest.approx(1)
    # IoU 0.62 counts at 0.5, 0.55 and 0.6, three of ten thresholds.
    assert ap([box((0, 0, 100, 62))], [box(SQUARE)]) == pytest.approx(0.3)
    # One of two found: precision 1 up to a recall of 0.5, that is at 51 of 101 points.
    assert ap([box(SQUARE)], [f"[{box(SQUARE)}, {box(FAR)}]"]) == pytest.approx(51 / 101)
    # A wrong box that is surer than the right one halves the precision; a less sure one costs nothing.
    assert ap([f"[{box(FAR, confidence=0.9)}, {box(SQUARE, confidence=0.4)}]"], [box(SQUARE)]) == pytest.approx(0.5)
    assert ap([f"[{box(FAR, confidence=0.4)}, {box(SQUARE, confidence=0.9)}]"], [box(SQUARE)]) == pytest.approx(1)
    # The mean over the labels that the references hold.
    assert ap([box(SQUARE)], [f"[{box(SQUARE)}, {box(FAR, 'dog')}]"]) == pytest.approx(0.5)


def drawn(seed, pictures=25):
    generator = np.random.default_rng(seed)
    answers, references, truth, found = [], [], [], []
    for picture in range(pictures):
        texts = ([], [])
        for number in range(generator.integers(1, 5)):
            corner, size = generator.integers(0, 500, 2), generator.integers(40, 300, 2)
            label = ["cat", "dog"][generator.integers(2)]
            meant = [*corner, *(corner + size)]
            said = [
                int(n)
                for n in np.sort((np.array(meant) + generator.integers(-30, 30, 4)).reshape(2, 2), axis=0).ravel()
            ]
            sure = round(float(generator.random()), 6)
            category = 1 + (label == "dog")
            truth.append({"id": len(truth) + 1, "image_id": picture, "category_id": category, "bbox": xywh(meant)})
            truth[-1]["iscrowd"] = 0
            truth[-1]["area"] = truth[-1]["bbox"][2] * truth[-1]["bbox"][3]
            texts[1].append(box(meant, label))
            if number != 2:
                found.append({"image_id": picture, "category_id": category, "bbox": xywh(said), "score": sure})
                texts[0].append(box(said, label, sure))
        answers.append(f"[{', '.join(texts[0])}]")
        references.append(f"[{', '.join(texts[1])}]")
    return answers, references, truth, found


def xywh(corners):
    x1, y1, x2, y2 = map(float, corners)
    return [x1, y1, x2 - x1, y2 - y1]


def test_average_precision_is_pycocotools_own_from_files():
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    for seed in range(3):
        answers, references, truth, found = drawn(seed)
        coco = COCO()
        coco.dataset = {"images": [{"id": n} for n in range(25)], "annotations": truth}
        coco.dataset |= {"categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}], "info": {}}
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
            theirs = COCOeval(coco, coco.loadRes(found), "bbox")
            theirs.evaluate()
            theirs.accumulate()
            theirs.summarize()
        assert ap(answers, references) == pytest.approx(theirs.stats[0], abs=1e-12)
        assert 0.1 < theirs.stats[0] < 0.9


def test_a_selection_scores_as_if_it_were_all_there_is():
    answers, references, _, _ = drawn(7)
    whole = AveragePrecision(answers, references, ["xyxy_1000"] * 25)
    chosen = [3, 4, 4, 11]
    again = ap([answers[n] for n in chosen], [references[n] for n in chosen])
    assert whole.value(np.array(chosen)) == pytest.approx(again, abs=1e-12)
    assert whole.value(np.arange(25)) == ap(answers, references), "and leaves nothing behind"


def test_map_has_an_interval_and_is_compared_by_swapping_pairs():
    answers, references, _, _ = drawn(1)
    score = score_answers(answers, references, "map")
    assert 0 < score.low < score.value < score.high < 1
    assert score.value == ap(answers, references)
    compared = compare_answers(answers, references, references, "map")
    assert compared.difference == pytest.approx(1 - score.value)
    assert compared.p_value < 0.01
    assert compared.low > 0
    same = compare_answers(answers, answers, references, "map")
    assert (same.p_value, same.difference, same.ties) == (1, 0, 25)


def test_references_without_boxes_are_refused():
    with pytest.raises(DataError, match="0 boxes in 2 references"):
        score_answers(["a", "b"], ["a", "b"], "map")
