"""Boxes are found where a text says that they are, and rewriting changes their numbers and nothing else."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensmith.data.box_text import KEYS, find_boxes, read_image_index, rewrite_boxes


def numbers(text, **options):
    return [span.numbers for span in find_boxes(text, **options)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"bbox_2d": [1, 2, 3, 4], "label": "cat"}', [(1, 2, 3, 4)]),
        ('```json\n[\n\t{"bbox_2d": [1, 2.5, 3, 4]},\n\t{"bbox": [5,6,7,8]}\n]\n```', [(1, 2.5, 3, 4), (5, 6, 7, 8)]),
        ('Here: {"box": [1, 2, 3, 4]} and {"box_2d": [-1, 0.5, 1e2, 4.]}.', [(1, 2, 3, 4), (-1, 0.5, 100, 4)]),
        ('{"boxes": [[1, 2, 3, 4], [5, 6, 7, 8]]}', [(1, 2, 3, 4), (5, 6, 7, 8)]),
        ('{"bbox": [[1, 2], [3, 4]]}', [(1, 2, 3, 4)]),
        ('{"point_2d": [1, 2]} {"point": [3, 4]} {"points": [[5, 6], [7, 8]]}', [(1, 2), (3, 4), (5, 6), (7, 8)]),
        ("{'bbox_2d': [1, 2, 3, 4]}", [(1, 2, 3, 4)]),
        ("<|box_start|>(1,2),(3,4)<|box_end|> <|box_start|>(5, 6)<|box_end|>", [(1, 2, 3, 4), (5, 6)]),
        ('[{"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [5, 6, 7', [(1, 2, 3, 4)]),
    ],
)
def test_boxes_are_found_in_every_form(text, found):
    assert numbers(text) == found
    assert [span.kind for span in find_boxes(text)] == ["box" if len(n) == 4 else "point" for n in found]


@pytest.mark.parametrize(
    "text",
    [
        "The cat is at [1, 2, 3, 4].",
        "Sort [4, 3, 2, 1] in this box.",
        '{"matrix": [1, 2, 3, 4], "label": "box"}',
        '{"bbox_2d": [1, 2, 3]} {"bbox": [1, 2, 3, 4, 5, 6, 7, 8]} {"point": [1, 2, 3]}',
        '{"bbox_2d": ["a", 2, 3, 4]} {"bbox_2d": "1, 2, 3, 4"} {"bbox": [x1, y1, x2, y2]} {"bbox": []}',
        '{"bbox_2d": [1e300, 2, 3, 4]}',
        '{"inbox": [1, 2, 3, 4]}',
    ],
)
def test_other_numbers_are_not_boxes(text):
    assert find_boxes(text) == ()
    assert find_boxes(text, bare=True) == ()


@pytest.mark.parametrize("text", ["[1, 2, 3, 4]", " [[1,2,3,4]]\n", "```json\n[1, 2, 3, 4]\n```"])
def test_text_that_is_a_list_is_a_box_where_that_is_known(text):
    assert numbers(text, bare=True) == [(1, 2, 3, 4)]
    assert find_boxes(text) == ()


def test_span_is_where_the_brackets_are():
    text = 'a {"bbox_2d" : [1, 2, 3, 4]} <|box_start|>(1,2),(3,4)<|box_end|>'
    first, second = find_boxes(text)
    assert (text[first.start : first.stop], first.key) == ("[1, 2, 3, 4]", "bbox_2d")
    assert (text[second.start : second.stop], second.key) == ("(1,2),(3,4)", None)


def test_rewriting_changes_numbers_only():
    text = 'Ü ```json\n[ {"label":"1, [2]", "bbox_2d" :[ 10,20 ,\t30.50,40 ] , "score": 0.5}]```\r\n[9, 9, 9, 9]'
    assert rewrite_boxes(text, lambda span: [n / 4 for n in span.numbers]) == (
        'Ü ```json\n[ {"label":"1, [2]", "bbox_2d" :[ 2.5,5 ,\t7.625,10 ] , "score": 0.5}]```\r\n[9, 9, 9, 9]'
    )


@settings(max_examples=200, deadline=None)
@given(st.text(), st.text(), st.sampled_from(sorted(KEYS)), st.lists(st.integers(-9999, 9999), min_size=4, max_size=4))
def test_text_around_a_box_never_matters(before, after, key, box):
    wanted = box if KEYS[key] == "box" else box[:2]
    text = f'{before}{{"{key}": {wanted}}}{after}'
    assert tuple(wanted) in numbers(text)
    assert rewrite_boxes(text, lambda span: span.numbers) == text


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="[]{}\"',:.-+e0123 boxpintd2_`<|>()\n", max_size=200), st.booleans())
def test_any_text_can_be_searched(text, bare):
    for span in find_boxes(text, bare=bare):
        assert 0 <= span.start < span.stop <= len(text)
        assert len(span.numbers) == (4 if span.kind == "box" else 2)


@pytest.mark.parametrize(
    "text",
    ['"bbox": [' + "1," * 100_000, '"bbox": [' + "1" * 100_000, '"bbox": [[' + "[1]," * 100_000, '{"bbox": ' * 20_000,
     '"bbox": [' + " " * 100_000, "<|box_start|>(" + "1," * 100_000],
)  # fmt: skip
def test_no_text_takes_long(text):
    started = time.perf_counter()
    find_boxes(text)
    find_boxes(text, bare=True)
    assert time.perf_counter() - started < 2, "linear: a tenth of a second here, hours if it were not"


def test_object_says_which_image_it_is_about():
    inner = {"bbox": [5, 6, 7, 8], "image_index": 0}
    text = json.dumps([{"bbox_2d": [1, 2, 3, 4], "image": 1, "parts": [inner]}, {"box": [0, 0, 9, 9]}])
    assert [read_image_index(text, span) for span in find_boxes(text)] == [1, 0, None]
    assert read_image_index("[1, 2, 3, 4]", find_boxes("[1, 2, 3, 4]", bare=True)[0]) is None
