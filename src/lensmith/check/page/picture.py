"""A picture as the model sees it, inside a page: small enough to embed, large enough to look at, boxes drawn over it.

Boxes lie over the picture in the units they are written in, 0 to 1000 of each side, so that no arithmetic of ours stands
between the numbers that are learned and the place where they are shown.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lensmith.evals.markup import data_uri, show

if TYPE_CHECKING:
    from PIL import Image

UNITS = 1000
"""Qwen3-VL's boxes: thousandths of the picture's width and height."""
LOSSLESS_BYTES = 100_000
"""A PNG up to this size is kept; larger ones become JPEG, whose artefacts the model does not see."""
JPEG_QUALITIES = (92, 80, 60)
SHOWN_PX = 1600
"""Longest side on the page; larger pictures are shown reduced, as they would be on any screen."""
SMALL_PX, SMALL_TARGET_PX = 160, 240
"""Pictures with a longest side under the first are shown at whole multiples, near the second."""
TALLEST_PX = 420
MOST_BOXES = 100
"""Drawn per picture; more are counted."""


@dataclass(frozen=True, slots=True)
class Box:
    """A box or point found in a text, in thousandths of the picture."""

    kind: Literal["box", "point"]
    numbers: tuple[float, ...]
    """x1, y1, x2, y2, or x, y."""
    learned: bool
    """Whether it stands in an answer; else in a question."""


def write_picture(image: Image.Image, boxes: Sequence[Box], *, alt: str, most_bytes: int) -> str:
    """An `<img>` of at most `most_bytes` before base64, in a frame that the boxes are laid over."""
    (width, height), factor = image.size, _enlarged(*image.size)
    content, kind = _encoded(image, most_bytes)
    pixelated = ' class="pixels"' if factor > 1 else ""
    return (
        f'<div class="frame" style="--w:{width * factor};--h:{height * factor};--most:{TALLEST_PX}">'
        f'<img{pixelated} src="{data_uri(content, kind)}" alt="{show(alt)}" width="{width}" height="{height}">'
        f"{_overlay(boxes[:MOST_BOXES])}</div>"
    )


def list_boxes(boxes: Sequence[Box]) -> str:
    """The numbers of each box under its number in the picture; empty for none."""
    if not boxes:
        return ""
    items = "".join(f'<li class="{_side(box)}"><code>{_numbers(box)}</code></li>' for box in boxes[:MOST_BOXES])
    more = f'<p class="soft">and {len(boxes) - MOST_BOXES:,} more</p>' if len(boxes) > MOST_BOXES else ""
    return f'<ol class="boxes">{items}</ol>{more}'


def _enlarged(width: int, height: int) -> int:
    longest = max(width, height)
    return max(1, round(SMALL_TARGET_PX / longest)) if longest < SMALL_PX else 1


def _encoded(image: Image.Image, most_bytes: int) -> tuple[bytes, str]:
    """The picture as a file, and its media type: lossless where that is small, else the best JPEG that fits."""
    image.thumbnail((SHOWN_PX, SHOWN_PX))
    lossless = _saved(image, "PNG")
    if len(lossless) <= min(LOSSLESS_BYTES, most_bytes):
        return lossless, "image/png"
    while True:
        for quality in JPEG_QUALITIES:
            content = _saved(image, "JPEG", quality=quality, subsampling=0)
            if len(content) <= most_bytes or max(image.size) == 1:
                return content, "image/jpeg"
        image = image.reduce(2)


def _saved(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _overlay(boxes: Sequence[Box]) -> str:
    if not boxes:
        return ""
    # Each outline twice: a light one below makes the coloured one visible on any picture.
    lines = "".join(
        f'<path class="{layer} {_side(box)}" d="{_outline(box)}"/>' for box in boxes for layer in ("under", "over")
    )
    tags = "".join(
        f'<b class="tag at-{box.kind} {_side(box)}" style="left:{_share(box.numbers[0])};top:{_share(box.numbers[1])}">'
        f"{number}</b>"
        for number, box in enumerate(boxes, 1)
    )
    svg = f'<svg viewBox="0 0 {UNITS} {UNITS}" preserveAspectRatio="none">{lines}</svg>'
    return f'<div class="overlay" aria-hidden="true">{svg}{tags}</div>'


def _outline(box: Box) -> str:
    if box.kind == "point":
        x, y = box.numbers[:2]
        return f"M{x:g} {y:g}h0"  # a line of no length with round ends is a dot of the same size in any picture
    left, top, right, bottom = box.numbers[:4]
    return f"M{left:g} {top:g}H{right:g}V{bottom:g}H{left:g}z"


def _share(number: float) -> str:
    return f"{min(max(number, 0), UNITS) / UNITS:.2%}"


def _side(box: Box) -> str:
    return "answer" if box.learned else "question"


def _numbers(box: Box) -> str:
    return ", ".join(f"{number:g}" for number in box.numbers)
