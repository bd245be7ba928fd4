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
from lensmith.types import Message, Moment, Text

if TYPE_CHECKING:
    from lensmith.config.tree import BoxConvention, Boxes
    from lensmith.types import ImageSize, Role, Sample

Numbers = tuple[float, ...]
"""Four of a box, two of a point."""
SidesPx = tuple[int, int]
"""Height and width in pixels."""

IN_WORDS: dict[BoxConvention, str] = {
    "xyxy_1000": "corners from 0 to 1000",
    "xyxy_px": "corners in pixels",
    "xywh_px": "x, y, width, height in pixels",
    "xyxy_unit": "corners from 0 to 1",
    "cxcywh_unit": "centre and size from 0 to 1",
    "resized_px": "corners in pixels of the resized picture",
}
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
    """The same box, or point of two numbers, in another convention; not rounded.

    Args:
        size_px: height and width of the original, upright; what `xyxy_px` and `xywh_px` refer to.
        seen_px: height and width after resizing; what `resized_px` refers to.
    """
    height, width = scale_of(source, size_px=size_px, seen_px=seen_px)
    new_height, new_width = scale_of(target, size_px=size_px, seen_px=seen_px)
    scales = new_width / width, new_height / height
    corners = corners_of(box, source)
    return box_of([number * scales[place % 2] for place, number in enumerate(corners)], target)


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
        sizes: of its pictures in the order of their marks, as in `Encoded.images`; a video counts as one picture.
        boxes: how they are written in the data; None, or no difference to the target, leaves the sample as it is.

    Raises:
        RowError: `malformed_row` for a box in pixels of which nothing says to which of several pictures it belongs.
    """
    messages = convert_messages(sample.messages, sample, sizes, boxes)
    return sample if messages is sample.messages else replace(sample, messages=tuple(messages))


def convert_messages(
    messages: Sequence[Message], sample: Sample, sizes: Sequence[ImageSize], boxes: Boxes | None
) -> Sequence[Message]:
    """The same for some of the sample's messages, such as those of a prompt."""
    if boxes is None or _is_spoken(boxes):
        return messages
    pictures = count_videos_once(sizes)
    return tuple(_converted(message, sample, pictures, boxes) for message in messages)


def describe_conversion(boxes: Boxes | None) -> tuple[str, ...]:
    """What is done to boxes, as a clause to print; nothing where nothing is."""
    if boxes is None or _is_spoken(boxes):
        return ()
    size = "" if boxes.size_px is None else f" of {boxes.size_px[1]:,} x {boxes.size_px[0]:,} px"
    return (f"boxes are read as {IN_WORDS[boxes.convention]}{size} and learned as {IN_WORDS[boxes.target]}.",)


def restore_answer(text: str, sample: Sample, sizes: Sequence[ImageSize]) -> str:
    """What the model answered to a sample, with its boxes in the convention of the data: to be shown and compared.

    A box of which the model does not say to which of several pictures it belongs stays as it is.

    Args:
        sizes: as in `convert_sample`.
    """
    boxes = sample.boxes
    if boxes is None or _is_spoken(boxes):
        return text

    pictures = count_videos_once(sizes)

    def restore(span: BoxSpan) -> Numbers:
        size = _size_for(span, text, pictures) if _needs_picture(boxes) else None
        if size is None and _needs_picture(boxes):
            return span.numbers
        return _restored(span, boxes, *_sides(sample, size, boxes))

    return rewrite_boxes(text, restore, bare=True)


def restore_text(text: str, size_px: SidesPx, seen_px: SidesPx, boxes: Boxes | None) -> str:
    """The same for a text about one picture of which the sizes are known.

    Args:
        size_px: height and width that pixels in the data refer to.
        seen_px: height and width of the picture as the model saw it.
    """
    if boxes is None or _is_spoken(boxes):
        return text
    return rewrite_boxes(text, lambda span: _restored(span, boxes, size_px, seen_px), bare=True)


def count_videos_once(sizes: Sequence[ImageSize]) -> list[ImageSize]:
    """One size per picture or video: the moments of a video are all of one size."""
    return [size for size in sizes if not isinstance(size.ref, Moment) or size.ref.index == 0]


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


def _is_spoken(boxes: Boxes) -> bool:
    """Whether the data is written as the model speaks."""
    return boxes.convention == boxes.target and boxes.size_px is None


def _needs_picture(boxes: Boxes) -> bool:
    """Whether converting asks for the size of a picture."""
    own_pixels = boxes.convention in ("xyxy_px", "xywh_px", "resized_px") and boxes.size_px is None
    return own_pixels or boxes.target == "resized_px"


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
        size = _size_for(span, text, sizes) if _needs_picture(boxes) else None
        if size is None and _needs_picture(boxes):
            raise RowError(
                sample.where,
                "malformed_row",
                f"the {span.kind} {text[span.start : span.stop]} is in pixels, and nothing says of which of the row's "
                f"{len(sizes)} pictures. "
                'Write "image_index": 0, 1, ... beside it, or give boxes from 0 to 1000, which need no picture.',
            )
        size_px, seen_px = _sides(sample, size, boxes)
        source = _source(boxes)
        box = cut_at_edges(span.numbers, source, scale_of(source, size_px=size_px, seen_px=seen_px))
        return round_box(convert_box(box, source, boxes.target, size_px=size_px, seen_px=seen_px), boxes.target)

    return convert


def _restored(span: BoxSpan, boxes: Boxes, size_px: SidesPx, seen_px: SidesPx) -> Numbers:
    size_px = boxes.size_px or size_px
    numbers = convert_box(span.numbers, boxes.target, _source(boxes), size_px=size_px, seen_px=seen_px)
    return round_box(numbers, boxes.convention)


def _source(boxes: Boxes) -> BoxConvention:
    """The data's convention for `convert_box`: pixels of some other resized picture are pixels of that declared size."""
    return "xyxy_px" if boxes.convention == "resized_px" and boxes.size_px is not None else boxes.convention


def _sides(sample: Sample, size: ImageSize | None, boxes: Boxes) -> tuple[SidesPx, SidesPx]:
    """What pixels in the data and those of the target refer to."""
    if size is None:
        return boxes.size_px or NO_SIDES, NO_SIDES
    return reference_px(sample, size, boxes), size.seen_px


def _size_for(span: BoxSpan, text: str, sizes: Sequence[ImageSize]) -> ImageSize | None:
    """The picture that a box belongs to: the only one, or the one that the text names; None where it names none."""
    index = 0 if len(sizes) == 1 else read_image_index(text, span)
    return sizes[index] if index is not None and index < len(sizes) else None
