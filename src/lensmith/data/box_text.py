"""Boxes and points in texts: where they stand, and how to change their numbers and nothing else.

    [{"bbox_2d": [10, 20, 300, 400], "label": "cat"}]        JSON under a key that says so, with or without ``` fences
    {"point_2d": [15, 25]}   {"points": [[1, 2], [3, 4]]}
    <|box_start|>(10,20),(300,400)<|box_end|>                Qwen2-VL's marks
    [10, 20, 300, 400]                                       a whole text, where it is known to be a box (`bare`)

Texts are searched, not parsed: an answer that was cut off, or JSON inside prose, still gives its boxes, and what is not
a number of a box keeps every character. Four numbers in brackets within a sentence are not a box.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["box", "point"]

KEYS: dict[str, Kind] = {
    "bbox_2d": "box",
    "bbox": "box",
    "bboxes": "box",
    "box_2d": "box",
    "box": "box",
    "boxes": "box",
    "point_2d": "point",
    "point": "point",
    "points": "point",
}
"""Keys whose numbers are boxes or points; the first of each is what Qwen3-VL writes."""
NUM_NUMBERS: dict[Kind, int] = {"box": 4, "point": 2}
IMAGE_KEYS = ("image_index", "image")
LABEL_KEYS = ("label", "category", "class", "name")
"""Keys of what a box shows; the first is what Qwen3-VL writes."""
CONFIDENCE_KEYS = ("confidence", "score")

LARGEST = 1e9
"""Larger numbers are no coordinates; they would overflow on the way."""

# Possessive, so that no text makes the search go back and forth.
NUMBER = re.compile(r"[-+]?(?:\d++(?:\.\d*+)?+|\.\d++)(?:[eE][-+]?\d++)?+")
_NUMBERS = rf"\s*+{NUMBER.pattern}(?:\s*+,\s*+{NUMBER.pattern})*+\s*+"
_LIST = rf"\[{_NUMBERS}\]"
_LISTS = rf"(?:{_LIST}|\[\s*{_LIST}(?:\s*,\s*{_LIST})*\s*\])"
KEYED = re.compile(rf"(?P<quote>[\"'])(?P<key>{'|'.join(KEYS)})(?P=quote)\s*:\s*(?P<lists>{_LISTS})")
_PAIR = rf"\({_NUMBERS}\)"
MARKED = re.compile(rf"<\|box_start\|>\s*(?P<pairs>{_PAIR}(?:\s*,\s*{_PAIR})?)\s*<\|box_end\|>")
BARE = re.compile(rf"\s*(?:```(?:json)?\s*)?(?P<lists>{_LISTS})\s*(?:```)?\s*")
INNERMOST = re.compile(_LIST)
IMAGE_INDEX = re.compile(rf"[\"'](?:{'|'.join(IMAGE_KEYS)})[\"']\s*:\s*(\d+)\s*[,}}]")
LABEL = re.compile(
    rf"[\"'](?:{'|'.join(LABEL_KEYS)})[\"']\s*:\s*(?P<quote>[\"'])(?P<label>(?:\\.|(?!(?P=quote)).)*+)(?P=quote)"
)
CONFIDENCE = re.compile(rf"[\"'](?:{'|'.join(CONFIDENCE_KEYS)})[\"']\s*:\s*({NUMBER.pattern})")


@dataclass(frozen=True, slots=True)
class BoxSpan:
    """One box or point in a text."""

    start: int
    stop: int
    """Its brackets in the text: text[start:stop]."""
    numbers: tuple[float, ...]
    """Four of a box, two of a point, as written."""
    kind: Kind
    key: str | None
    """The key that says so; None between marks and for a bare list."""


def find_boxes(text: str, *, bare: bool = False) -> tuple[BoxSpan, ...]:
    """Boxes and points in order.

    Args:
        bare: whether a text that is nothing but a list of four numbers, or a list of such lists, is boxes too.
    """
    if "box" not in text and "point" not in text and not bare:
        return ()
    found = [span for match in KEYED.finditer(text) for span in _keyed(match)]
    found += [_span(text, match.start("pairs"), match.end("pairs"), None) for match in MARKED.finditer(text)]
    if bare and not found and (match := BARE.fullmatch(text)):
        found += _listed(text, *match.span("lists"), "box", None)
    return tuple(sorted(filter(_is_sound, found), key=lambda span: span.start))


def rewrite_boxes(text: str, convert: Callable[[BoxSpan], Sequence[float]], *, bare: bool = False) -> str:
    """The text with the numbers that `convert` gives for each box; all else, white space included, stays as it is."""
    pieces, end = [], 0
    for span in find_boxes(text, bare=bare):
        old = NUMBER.finditer(text, span.start, span.stop)
        for match, new in zip(old, convert(span), strict=True):
            pieces += [text[end : match.start()], _spelled(new)]
            end = match.end()
    return "".join([*pieces, text[end:]]) if pieces else text


def read_image_index(text: str, span: BoxSpan) -> int | None:
    """What the object around a box says about which image it belongs to, counted from 0; None where it says nothing.

    That is a whole number under `image_index` or `image`.
    """
    start, stop = _object_around(text, span)
    match = IMAGE_INDEX.search(text, start, stop)
    return int(match[1]) if match else None


def read_label(text: str, span: BoxSpan) -> str:
    """What the object around a box says that it shows; empty where it says nothing."""
    match = LABEL.search(text, *_object_around(text, span))
    return match["label"] if match else ""


def read_confidence(text: str, span: BoxSpan) -> float | None:
    """How sure the object around a box says that it is; None where it says nothing."""
    match = CONFIDENCE.search(text, *_object_around(text, span))
    return float(match[1]) if match else None


def is_coordinate(value: Any) -> bool:
    """Whether the value is a number that can be a coordinate."""
    return type(value) in (int, float) and -LARGEST < value < LARGEST


def _is_sound(span: BoxSpan) -> bool:
    return len(span.numbers) == NUM_NUMBERS[span.kind] and all(map(is_coordinate, span.numbers))


def _keyed(match: re.Match[str]) -> Iterator[BoxSpan]:
    yield from _listed(match.string, *match.span("lists"), KEYS[match["key"]], match["key"])


def _listed(text: str, start: int, stop: int, kind: Kind, key: str | None) -> Iterator[BoxSpan]:
    """A box per innermost list; two pairs under the key of a box are the corners of one."""
    lists = [_span(text, *match.span(), key, kind) for match in INNERMOST.finditer(text, start, stop)]
    if kind == "box" and [len(span.numbers) for span in lists] == [2, 2]:
        lists = [_span(text, start, stop, key, kind)]
    yield from lists


def _span(text: str, start: int, stop: int, key: str | None, kind: Kind | None = None) -> BoxSpan:
    numbers = tuple(float(match[0]) for match in NUMBER.finditer(text, start, stop))
    return BoxSpan(start, stop, numbers, kind or ("point" if len(numbers) == 2 else "box"), key)


def _object_around(text: str, span: BoxSpan) -> tuple[int, int]:
    """Start and stop of the braces that the box stands in; of the whole text where there are none."""
    start, depth = span.start, 0
    while start > 0 and depth < 1:
        start -= 1
        depth += (text[start] == "{") - (text[start] == "}")
    stop, depth = span.stop, 0
    while stop < len(text) and depth < 1:
        depth += (text[stop] == "}") - (text[stop] == "{")
        stop += 1
    return start, stop


def _spelled(number: float) -> str:
    """Plain digits, at most six behind the point and no trailing zeros: 12, 0.25."""
    text = f"{number:.6f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
