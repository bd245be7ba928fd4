"""Boxes and points from one convention to another, in numbers and in samples.

Every convention gives corners on a scale of its own: 1000, 1, the sides of the picture, the sides of the resized picture.

    numbers ──> corners ──> times (target scale / source scale) ──> numbers ──> rounded to the target's grid

`convert_box` is exact, so there and back is the identity but for float rounding, for every pair of conventions and any
size. What is written in texts is rounded by `round_box`, and that loses at most half a step of the target's grid per
corner: 0.5 of the whole numbers from 0 to 1000 is 2 px of a picture of 4,000 px, which no writing of whole numbers can
avoid. It is the model's own resolution. (Qwen's cookbooks read answers as number / 1000 x side.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lensmith.data.box_text import BoxSpan, read_image_index, rewrite_boxes
from lensmith.errors import RowError
from lensmith.types import Message, Text

if TYPE_CHECKING:
    from lensmith.config.tree import BoxConvention, Boxes
    from lensmith.types import ImageSize, Role, Sample

Numbers = tuple[float, ...]
"""Four of a box, two of a point."""
SidesPx = tuple[int, int]
"""Height and width in pixels."""

DECIMALS: dict[BoxConvention, int] = {
    "xyxy_1000": 0,
    "resized_px": 0,
    "xyxy_px": 2,
    "xywh_px": 2,
    "xyxy_unit": 6,
    "cxcywh_unit": 6,
}
"""Digits behind the point: whole numbers for what models write, two as COCO writes pixels, six as YOLO's tools write shares
(a hundredth of a pixel in a picture of 10,000)."""
SLACK: dict[BoxConvention, float] = {
    "xyxy_1000": 0,
    "resized_px": 1,
    "xyxy_px": 1,
    "xywh_px": 1,
    "xyxy_unit": 1e-3,
    "cxcywh_unit": 1e-3,
}
"""How far a box may reach beyond its picture: annotation tools round outwards. Such a box is cut at the edge."""
ANNOTATED_PX = "annotated_px"
"""Column with the height and width that an annotation file gives for its picture, and that its pixels refer to."""
NO_SIDES: SidesPx = (1, 1)
"""Stands for a size that neither convention asks for."""
MARKING_ROLES = ("user", "assistant")
"""Whose texts are read for boxes."""


def convert_box(
    box: Sequence[float], source: BoxConvention, target: BoxConvention, *, size_px: SidesPx, seen_px: SidesPx
) -> Numbers:
    """The same box in another convention, not rounded.

    Args:
        size_px: height and width of the original, upright; what `xyxy_px` and `xywh_px` refer to.
        seen_px: height and width after resizing; what `resized_px` refers to.
    """
    corners = convert_point(corners_of(box, source), source, target, size_px=size_px, seen_px=seen_px)
    return box_of(corners, target)


def convert_point(
    point: Sequence[float], source: BoxConvention, target: BoxConvention, *, size_px: SidesPx, seen_px: SidesPx
) -> Numbers:
    """The same point, or run of x, y, x, y, in another convention, not rounded; sizes as in `convert_box`."""
    scales = [
        after / before
        for before, after in zip(
            scale_of(source, size_px=size_px, seen_px=seen_px),
            scale_of(target, size_px=size_px, seen_px=seen_px),
            strict=True,
        )
    ]
    return tuple(number * scales[1 - place % 2] for place, number in enumerate(point))


def scale_of(convention: BoxConvention, *, size_px: SidesPx, seen_px: SidesPx) -> tuple[float, float]:
    """What the bottom and the right edge of the picture are called in this convention."""
    if convention == "xyxy_1000":
        return 1000, 1000
    if convention in ("xyxy_unit", "cxcywh_unit"):
        return 1, 1
    return seen_px if convention == "resized_px" else size_px


def corners_of(box: Sequence[float], convention: BoxConvention) -> Numbers:
    """x1, y1, x2, y2 on the scale of the convention; a point is its own corner."""
    if len(box) == 4 and convention == "xywh_px":
        x, y, width, height = box
        return x, y, x + width, y + height
    if len(box) == 4 and convention == "cxcywh_unit":
        x, y, width, height = box
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2
    return tuple(box)


def box_of(corners: Sequence[float], convention: BoxConvention) -> Numbers:
    """The inverse of `corners_of`."""
    if len(corners) == 4 and convention == "xywh_px":
        x1, y1, x2, y2 = corners
        return x1, y1, x2 - x1, y2 - y1
    if len(corners) == 4 and convention == "cxcywh_unit":
        x1, y1, x2, y2 = corners
        return (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
    return tuple(corners)


def round_box(box: Sequence[float], convention: BoxConvention) -> Numbers:
    """The box on the convention's grid (DECIMALS), each number to the nearest.

    On a grid of whole numbers a side thinner than a step would sometimes vanish; it becomes the one step it mostly lies
    in, so that a box stays a box. Its corners are then off by less than a step instead of half a step.
    """
    decimals = DECIMALS[convention]
    rounded = [round(number, decimals) for number in box]
    if decimals == 0 and len(box) == 4:
        for low, high in ((0, 2), (1, 3)):
            if rounded[low] == rounded[high] and box[low] < box[high]:
                rounded[low] = math.floor((box[low] + box[high]) / 2)
                rounded[high] = rounded[low] + 1
    return tuple(rounded)


def cut_at_edges(box: Sequence[float], convention: BoxConvention, scale: tuple[float, float]) -> Numbers:
    """The box without what reaches beyond its picture by no more than SLACK; worse boxes stay, for `check` to report."""
    slack, corners = SLACK[convention], corners_of(box, convention)
    cut = []
    for place, number in enumerate(corners):
        edge = scale[1 - place % 2]
        is_slack = -slack <= number < 0 or edge < number <= edge + slack
        cut.append(min(max(number, 0), edge) if is_slack else number)
    return tuple(box) if tuple(cut) == corners else box_of(cut, convention)


def convert_sample(sample: Sample, sizes: Sequence[ImageSize], boxes: Boxes | None) -> Sample:
    """The sample with the boxes in its questions and answers as the model speaks them (`boxes.target`).

    Args:
        sizes: of `sample.images`, in that order.
        boxes: how they are written in the data; None, or no difference to the target, leaves the sample as it is.

    Raises:
        RowError: `malformed_row` for a box in pixels of which nothing says to which of several images it belongs.
    """
    if boxes is None or (boxes.convention == boxes.target and boxes.size_px is None):
        return sample
    messages = tuple(_converted(message, sample, sizes, boxes) for message in sample.messages)
    return sample if messages == sample.messages else replace(sample, messages=messages)


def restore_text(text: str, size_px: SidesPx, seen_px: SidesPx, boxes: Boxes | None) -> str:
    """What the model said, with its boxes in the convention of the data: the way back of `convert_sample`.

    Args:
        size_px: height and width that pixels in the data refer to, as `reference_px` gives them.
        seen_px: height and width of the picture as the model saw it.
    """
    if boxes is None or (boxes.convention == boxes.target and boxes.size_px is None):
        return text
    source, size_px = _written_in(boxes, size_px)

    def restore(span: BoxSpan) -> Numbers:
        box = convert_box(span.numbers, boxes.target, source, size_px=size_px, seen_px=seen_px)
        return round_box(box, boxes.convention)

    return rewrite_boxes(text, restore, bare=True)


def reference_px(sample: Sample, size: ImageSize, boxes: Boxes | None) -> SidesPx:
    """Height and width that pixel values of this sample refer to: declared, else annotated, else the picture's own."""
    if boxes is not None and boxes.size_px is not None:
        return boxes.size_px
    return annotated_px(sample) or size.original_px


def annotated_px(sample: Sample) -> SidesPx | None:
    """The size that an annotation file gives for the picture; only its reader writes a tuple into this column."""
    found = sample.columns.get(ANNOTATED_PX)
    return found if isinstance(found, tuple) else None


def marking_texts(sample: Sample, boxes: Boxes | None) -> Iterator[tuple[Role, bool, str]]:
    """Texts in which boxes are looked for: who says them, whether a text that is nothing but numbers is a box, the text."""
    for message in sample.messages:
        if message.role in MARKING_ROLES:
            for part in message.parts:
                if isinstance(part, Text):
                    yield message.role, is_bare(message.role, boxes), part.text


def is_bare(role: Role, boxes: Boxes | None) -> bool:
    """Whether a text by this speaker that is nothing but numbers is a box: an answer is, once boxes are declared."""
    return boxes is not None and role == "assistant"


def _written_in(boxes: Boxes, size_px: SidesPx) -> tuple[BoxConvention, SidesPx]:
    """The convention of the data as `convert_box` takes it: pixels of another resized picture are pixels of that size."""
    if boxes.size_px is None:
        return boxes.convention, size_px
    return "xyxy_px" if boxes.convention == "resized_px" else boxes.convention, boxes.size_px


def _converted(message: Message, sample: Sample, sizes: Sequence[ImageSize], boxes: Boxes) -> Message:
    if message.role not in MARKING_ROLES:
        return message
    bare = is_bare(message.role, boxes)
    parts = tuple(
        Text(rewrite_boxes(part.text, _converter(part.text, sample, sizes, boxes), bare=bare))
        if isinstance(part, Text)
        else part
        for part in message.parts
    )
    return Message(message.role, parts)


def _converter(text: str, sample: Sample, sizes: Sequence[ImageSize], boxes: Boxes) -> Callable[[BoxSpan], Numbers]:
    def convert(span: BoxSpan) -> Numbers:
        size = _size_for(span, text, sample, sizes, boxes)
        seen_px = size.seen_px if size else NO_SIDES
        source, size_px = _written_in(boxes, reference_px(sample, size, boxes) if size else NO_SIDES)
        box = cut_at_edges(span.numbers, source, scale_of(source, size_px=size_px, seen_px=seen_px))
        return round_box(convert_box(box, source, boxes.target, size_px=size_px, seen_px=seen_px), boxes.target)

    return convert


def _size_for(span: BoxSpan, text: str, sample: Sample, sizes: Sequence[ImageSize], boxes: Boxes) -> ImageSize | None:
    """The picture that a box belongs to; None where neither convention asks for one."""
    in_pixels = boxes.convention in ("xyxy_px", "xywh_px", "resized_px") and boxes.size_px is None
    if boxes.target != "resized_px" and not in_pixels:
        return None
    index = 0 if len(sizes) == 1 else read_image_index(text, span)
    if index is not None and index < len(sizes):
        return sizes[index]
    says = "says nothing of which" if index is None else f"says image {index}"
    raise RowError(
        sample.where,
        "malformed_row",
        f"{text[span.start : span.stop]} is a {span.kind} in pixels and {says}, but the row has {len(sizes)} images. "
        'Write "image_index": 0, 1, ... beside it, or give boxes from 0 to 1000, which need no picture.',
    )
