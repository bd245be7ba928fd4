"""Boxes keep their place through every convention, and what their numbers prove is told with both values."""

import json
import pickle
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensmith.config.tree import BoxConvention, Boxes
from lensmith.data.box_evidence import BoxTally, audit_boxes, judge
from lensmith.data.boxes import (
    DECIMALS,
    convert_box,
    convert_sample,
    corners_of,
    restore_answer,
    restore_text,
    round_box,
    scale_of,
)
from lensmith.errors import RowError
from lensmith.types import ImageMark, ImageRef, ImageSize, Message, Sample, Text

CONVENTIONS = BoxConvention.__args__
FINE = [convention for convention in CONVENTIONS if DECIMALS[convention]]
SIDE_PX = st.integers(32, 20_000)
SIZE_PX = st.tuples(SIDE_PX, SIDE_PX)


@st.composite
def boxes_in(draw, size_px):
    """Corners in pixels of a box of at least a pixel, anywhere in a picture of that height and width."""
    height, width = size_px
    x1, y1 = draw(st.floats(0, width - 1)), draw(st.floats(0, height - 1))
    return x1, y1, draw(st.floats(x1 + 1, width)), draw(st.floats(y1 + 1, height))


def build_sample(*boxes, key="bbox_2d", images=1, answer=None, size_px=(480, 640), seen_px=(480, 640), **fields):
    """A row with these boxes in its answer, and the sizes of its pictures."""
    refs = tuple(ImageRef(b"", str(number)) for number in range(images))
    text = json.dumps([{key: list(box)} for box in boxes]) if answer is None else answer
    question = (*(ImageMark(number) for number in range(images)), Text("Where?"))
    sample = Sample("rows.jsonl:3", (Message("user", question), Message("assistant", (Text(text),))), refs, **fields)
    return sample, [ImageSize(ref, size_px, seen_px, 300) for ref in refs]


def corners_px(box, convention, size_px, seen_px):
    """Corners in pixels of the original."""
    return convert_box(
        corners_of(box, convention),
        {"cxcywh_unit": "xyxy_unit", "xywh_px": "xyxy_px"}.get(convention, convention),
        "xyxy_px",
        size_px=size_px,
        seen_px=seen_px,
    )


@pytest.mark.parametrize(
    ("convention", "numbers"),
    [
        ("xyxy_1000", (100, 250, 300, 750)),
        ("xyxy_px", (200, 100, 600, 300)),
        ("xywh_px", (200, 100, 400, 200)),
        ("xyxy_unit", (0.1, 0.25, 0.3, 0.75)),
        ("cxcywh_unit", (0.2, 0.5, 0.2, 0.5)),
        ("resized_px", (100, 50, 300, 150)),
    ],
)
def test_one_box_in_every_convention(convention, numbers):
    """The table of docs/boxes.md: a picture of 2,000 x 400 px, seen at 1,000 x 200."""
    sizes = {"size_px": (400, 2000), "seen_px": (200, 1000)}
    assert convert_box((200, 100, 600, 300), "xyxy_px", convention, **sizes) == pytest.approx(numbers)
    assert convert_box(numbers, convention, "xyxy_px", **sizes) == pytest.approx((200, 100, 600, 300))


@settings(max_examples=100, deadline=None)
@given(st.data(), SIZE_PX, SIZE_PX, st.sampled_from(CONVENTIONS), st.sampled_from(CONVENTIONS))
def test_there_and_back_is_the_identity(data, size_px, seen_px, source, target):
    """Not rounded, to a millionth of a pixel: float64 has 16 digits and sides have five."""
    sizes = {"size_px": size_px, "seen_px": seen_px}
    box = convert_box(data.draw(boxes_in(size_px)), "xyxy_px", source, **sizes)
    back = convert_box(convert_box(box, source, target, **sizes), target, source, **sizes)
    assert corners_px(back, source, **sizes) == pytest.approx(corners_px(box, source, **sizes), abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.data(), SIZE_PX, SIZE_PX, st.sampled_from(CONVENTIONS), st.sampled_from(CONVENTIONS))
def test_rounded_there_and_back_is_the_identity_to_a_pixel_or_half_a_step(data, size_px, seen_px, source, target):
    """Half a step of the target's grid per number; a size of two rounded numbers adds theirs up; a side thinner than a
    step becomes one step and may be off by less than that."""
    sizes = {"size_px": size_px, "seen_px": seen_px}
    box = convert_box(data.draw(boxes_in(size_px)), "xyxy_px", source, **sizes)
    there = round_box(convert_box(box, source, target, **sizes), target)
    back = convert_box(there, target, source, **sizes)
    for place, (new, old) in enumerate(
        zip(corners_px(back, source, **sizes), corners_px(box, source, **sizes), strict=True)
    ):
        axis = 1 - place % 2
        step_px = 10.0 ** -DECIMALS[target] * size_px[axis] / scale_of(target, **sizes)[axis]
        exact = corners_px(box, source, **sizes)
        is_thin = exact[place % 2 + 2] - exact[place % 2] < step_px
        assert abs(new - old) <= max(1, step_px if is_thin else step_px / 2) + 1e-6


@settings(max_examples=100, deadline=None)
@given(st.data(), SIZE_PX, st.sampled_from(FINE), st.sampled_from(["xyxy_1000", "resized_px"]))
def test_what_the_model_says_survives_being_restored_and_converted_again(data, size_px, convention, target):
    """Since the decimals of data conventions are finer than the model's whole numbers."""
    seen_px = data.draw(st.tuples(*(st.integers(max(32, side // 8), 8 * side) for side in size_px)))
    boxes = Boxes(convention=convention, target=target)
    height, width = (int(side) for side in scale_of(target, size_px=size_px, seen_px=seen_px))
    x1, y1 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    said = json.dumps(
        {"bbox_2d": [x1, y1, data.draw(st.integers(x1 + 1, width)), data.draw(st.integers(y1 + 1, height))]}
    )
    sample, sizes = build_sample(answer=restore_text(said, size_px, seen_px, boxes), size_px=size_px, seen_px=seen_px)
    assert convert_sample(sample, sizes, boxes).answer == said


def test_thin_box_stays_a_box():
    assert round_box((500.2, 10, 500.4, 999.9), "xyxy_1000") == (500, 10, 501, 1000)
    assert round_box((999.8, 0, 1000, 0.1), "xyxy_1000") == (999, 0, 1000, 1)


def test_boxes_of_answers_and_questions_become_what_the_model_speaks():
    sample, sizes = build_sample([64, 48, 320, 240])
    question = Message("user", (ImageMark(0), Text('What is in {"bbox_2d": [0, 0, 640, 480]}?')))
    sample = Sample(sample.where, (question, sample.messages[1]), sample.images)
    spoken = convert_sample(sample, sizes, Boxes(convention="xyxy_px"))
    assert spoken.answer == '[{"bbox_2d": [100, 100, 500, 500]}]'
    assert spoken.question == 'What is in {"bbox_2d": [0, 0, 1000, 1000]}?'
    assert convert_sample(sample, sizes, None) is sample
    assert convert_sample(sample, sizes, Boxes(convention="xyxy_1000")) is sample


def test_declared_size_is_what_pixels_refer_to():
    """Boxes drawn on a copy of 320 x 240 px; and those of another pipeline's resizing, as Qwen2.5-VL's data has."""
    sample, sizes = build_sample([32, 24, 160, 120])
    for convention in ("xyxy_px", "resized_px"):
        boxes = Boxes(convention=convention, size_px=(240, 320))
        assert convert_sample(sample, sizes, boxes).answer == '[{"bbox_2d": [100, 100, 500, 500]}]'
        assert restore_answer('{"bbox_2d": [100, 100, 500, 500]}', *build_sample(boxes=boxes)) == (
            '{"bbox_2d": [32, 24, 160, 120]}'
        )


def test_box_a_pixel_over_the_edge_is_cut_there_and_a_worse_one_is_left_to_be_seen():
    sample, sizes = build_sample([-0.4, 0, 640.9, 480], [-20, 0, 640, 480])
    assert convert_sample(sample, sizes, Boxes(convention="xyxy_px")).answer == (
        '[{"bbox_2d": [0, 0, 1000, 1000]}, {"bbox_2d": [-31, 0, 1000, 1000]}]'
    )


def test_bare_list_is_a_box_once_boxes_are_declared():
    sample, sizes = build_sample(answer="[64, 48, 320, 240]")
    assert convert_sample(sample, sizes, Boxes(convention="xyxy_px")).answer == "[100, 100, 500, 500]"
    assert audit_boxes(sample, sizes, None).boxes == 0
    assert audit_boxes(sample, sizes, Boxes(convention="xyxy_px")).boxes == 1


def test_pixel_box_among_several_pictures_must_say_which():
    boxes = Boxes(convention="xyxy_px")
    sample, sizes = build_sample([64, 48, 320, 240], images=2)
    sentence = (
        r"rows\.jsonl:3: the box \[64, 48, 320, 240\] is in pixels, and nothing says of which of the row's 2 pictures"
    )
    with pytest.raises(RowError, match=sentence) as caught:
        convert_sample(sample, sizes, boxes)
    assert caught.value.code == "malformed_row"
    assert '"image_index": 0, 1, ...' in caught.value.sentence
    said, sizes = build_sample(answer='[{"bbox_2d": [64, 48, 320, 240], "image_index": 1}]', images=2)
    sizes[1] = ImageSize(said.images[1], (96, 640), (96, 640), 60)
    assert "[100, 500, 500, 2500]" in convert_sample(said, sizes, boxes).answer
    shares, sizes = build_sample([0.1, 0.1, 0.5, 0.5], images=2)
    assert "[100, 100, 500, 500]" in convert_sample(shares, sizes, Boxes(convention="xyxy_unit")).answer


def test_answers_come_back_in_the_convention_of_the_data():
    boxes = Boxes(convention="xywh_px")
    sample, sizes = build_sample([64, 48, 256, 192], boxes=boxes)
    spoken = convert_sample(sample, sizes, boxes).answer
    assert spoken == '[{"bbox_2d": [100, 100, 500, 500]}]'
    assert restore_answer(spoken, sample, sizes) == sample.answer
    assert restore_text(spoken, (480, 640), (480, 640), boxes) == sample.answer
    unsaid, sizes = build_sample(images=2, boxes=boxes)
    assert restore_answer(spoken, unsaid, sizes) == spoken, "of which picture, nobody knows"


BIG = (1000, 2000)


@pytest.mark.parametrize(
    ("boxes", "size_px", "evidence", "code", "sentence"),
    [
        ([[100, 40, 300, 90]], (480, 640), {"xyxy_1000", "xyxy_px", "xywh_px"}, None, ""),
        ([[600, 40, 900, 90]], (480, 640), {"xyxy_1000"}, None, ""),
        ([[1200, 40, 1500, 90]], BIG, {"xyxy_px"}, "box_convention",
         r"box \[1200, 40, 1500, 90\] cannot be from 0 to 1000; in the picture of 2,000 x 1,000 px it fits corners in "
         r"pixels\. Say so with data\.boxes\.convention=xyxy_px"),
        ([[0.2, 0.2, 0.4, 0.5]], (480, 640), {"xyxy_unit"}, "box_convention", r"data\.boxes\.convention=xyxy_unit"),
        ([[0.5, 0.5, 0.3, 0.2]], (480, 640), {"cxcywh_unit"}, "box_convention", r"data\.boxes\.convention=cxcywh_unit"),
        ([[0.4, 0.4, 0.5, 0.6]], (480, 640), {"xyxy_unit", "cxcywh_unit"}, "box_convention", r"=xyxy_unit or cxcywh_unit"),
        ([[500, 400, 100, 50]], (480, 640), {"xywh_px"}, "box_convention", r"data\.boxes\.convention=xywh_px"),
        ([[400, 300, 100, 200]], (480, 640), set(), "box_inverted",
         r"box \[400, 300, 100, 200\] has its second corner left of or above the first, .* 640 x 480 px"),
        ([[-5, 10, 2000, 30]], (480, 640), set(), "box_out_of_range", r"\[-5, 10, 2000, 30\] lies outside of 0 to 1000"),
        ([[10, 10, 20, 20], [-5, 10, 20, 30]], (480, 640), set(), "box_out_of_range", r"\[-5, 10, 20, 30\]"),
        ([[1200, 40, 1500, 90], [400, 800, 100, 50]], BIG, set(), "box_convention", r"the row mixes conventions"),
    ],
)  # fmt: skip
def test_undeclared_boxes_are_judged_by_what_their_numbers_prove(boxes, size_px, evidence, code, sentence):
    notes = audit_boxes(*build_sample(*boxes, size_px=size_px), None)
    assert (notes.boxes, notes.evidence) == (len(boxes), evidence)
    assert [found for found, _ in notes.faults] == ([code] if code else [])
    if code:
        assert re.search(sentence, notes.faults[0][1]), notes.faults
    assert pickle.loads(pickle.dumps(notes)) == notes


@pytest.mark.parametrize(
    ("box", "convention", "code", "sentence"),
    [
        ([10, 20, 640.5, 90], "xyxy_px", None, ""),
        ([0.5, 0.5, 1.0004, 0.2], "cxcywh_unit", None, ""),
        ([10, 20, 700, 90], "xyxy_px", "box_out_of_range",
         "box [10, 20, 700, 90], read as declared (data.boxes.convention=xyxy_px, corners in pixels), lies outside of the "
         "picture of 640 x 480 px. Correct it, or declare another convention. It would fit corners from 0 to 1000."),
        ([300, 20, 200, 90], "xyxy_px", "box_inverted", "has its second corner left of or above the first"),
        ([300, 20, 400, 90], "xywh_px", "box_out_of_range", "the picture of 640 x 480 px"),
        ([10, 20, 1001, 90], "xyxy_1000", "box_out_of_range", "lies outside of that"),
        ([0.1, 0.2, 0.5, 0.6], "xyxy_px", "box_convention", "is of fractions up to 1, but the data declares"),
        ([2, 0.2, 0.5, 0.6], "cxcywh_unit", "box_out_of_range", "lies outside of that"),
    ],
)  # fmt: skip
def test_declared_boxes_are_held_against_the_declaration(box, convention, code, sentence):
    notes = audit_boxes(*build_sample(box), Boxes(convention=convention))
    assert [found for found, _ in notes.faults] == ([code] if code else [])
    assert sentence in "".join(told for _, told in notes.faults)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.one_of(st.floats(-1e9, 1e9), st.integers(-2, 2000)), min_size=4, max_size=4), max_size=3),
    st.sampled_from([None, *CONVENTIONS]),
    st.integers(0, 3),
)
def test_any_numbers_can_be_judged_and_converted(boxes, convention, images):
    declared = convention and Boxes(convention=convention)
    sample, sizes = build_sample(*boxes, images=images, boxes=declared)
    notes = audit_boxes(sample, sizes, declared)
    assert len(notes.faults) <= 1
    judge(BoxTally.of([notes]), declared)
    try:
        spoken = convert_sample(sample, sizes, declared).answer
    except RowError:
        spoken = "[]"
        assert images != 1
    json.loads(restore_answer(spoken, sample, sizes))


def test_points_lie_in_their_picture_and_have_no_second_corner():
    assert audit_boxes(*build_sample([15, 30], key="point_2d"), None).points == 1
    notes = audit_boxes(*build_sample([1500, 30], key="point_2d", size_px=BIG), None)
    assert notes.faults[0][0] == "box_convention"
    assert "the point [1500, 30] cannot be from 0 to 1000" in notes.faults[0][1]


def test_zeros_that_show_the_form_of_an_answer_are_no_fault():
    sample, sizes = build_sample([10, 20, 30, 40])
    question = Message("user", (ImageMark(0), Text('Answer like {"bbox_2d": [0, 0, 0, 0]}.')))
    assert audit_boxes(Sample("a:1", (question, sample.messages[1]), sample.images), sizes, None).faults == ()


def test_verdict_says_what_is_assumed_and_how_sure_that_is():
    def verdict(*rows, declared=None):
        notes = [audit_boxes(*build_sample(*boxes), declared) for boxes in rows]
        halves = BoxTally.of(notes[:1]) + BoxTally.of(notes[1:])
        assert halves == BoxTally.of(notes)
        return judge(halves, declared)

    assert verdict([]) is None
    assert verdict([[10, 20, 30, 40]], [[600, 40, 900, 90]]) == (
        "2 boxes in 2 rows; 2 rows fit 0 to 1000, and 1 of these nothing else, 1 would fit another convention too."
    )
    assert verdict([[10, 20, 30, 40]]) == (
        "1 box in 1 row; 1 row fits 0 to 1000, which is assumed, but every one of these would fit another convention too; if "
        "they are corners in pixels or x, y, width, height in pixels, declare it with "
        "data.boxes.convention=xyxy_px or xywh_px."
    )
    assert verdict([[0.1, 0.2, 0.9, 0.9]]) == (
        "1 box in 1 row; none can be from 0 to 1000, all fit corners from 0 to 1; declare it with "
        "data.boxes.convention=xyxy_unit; 1 row with a fault."
    )
    assert verdict([[10, 20, 30, 40]], [[500, 400, 100, 50]]) == (
        "2 boxes in 2 rows; 1 row fits 0 to 1000, but all 2 fit x, y, width, height in pixels, so that is what they seem to "
        "be; declare it with data.boxes.convention=xywh_px; 1 row with a fault."
    )
    declared = Boxes(convention="xyxy_px")
    assert verdict([[10, 20, 30, 40]], declared=declared) == "1 box in 1 row, declared as corners in pixels."
    assert verdict([], declared=declared).startswith("no boxes found, though data.boxes.convention=xyxy_px is declared")
