"""Small copies of what the model saw, as addresses for a page; each picture is read and reduced once."""

from __future__ import annotations

import io
from collections import OrderedDict

from PIL import Image, ImageOps

from lensmith.data.frames import read_moment
from lensmith.data.headers import PILLOW_FAULTS, open_undecoded
from lensmith.data.images import open_image
from lensmith.errors import RowError
from lensmith.evals.markup import data_uri
from lensmith.types import ImageSize, Moment

THUMBNAIL_PX = 320
"""Longest side: enough for 200 CSS pixels on most screens, and to read a chart's title."""
KEPT = 256
"""Pictures whose copies are remembered, those used least recently go first; about 4 MB."""
JPEG_QUALITY = 80


class Thumbnails:
    """`Thumbnails()(size)` is a data URI, or the sentence that says why there is none."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[str | None, str]] = OrderedDict()

    def __call__(self, size: ImageSize) -> tuple[str | None, str]:
        """Address and fault, of which one is empty; a picture that has vanished since is no reason to stop a run."""
        key = f"{size.ref.key} {size.ref.page if not isinstance(size.ref, Moment) else ''}"
        if key not in self._kept:
            try:
                self._kept[key] = (data_uri(_encoded(_reduced(size)), "image/jpeg"), "")
            except RowError as fault:
                self._kept[key] = (None, fault.sentence)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


def _reduced(size: ImageSize) -> Image.Image:
    """The picture upright, in RGB and no larger than THUMBNAIL_PX. Raises RowError where it cannot be read any more."""
    if isinstance(size.ref, Moment):
        # At the size seen, which is the one that the rollout decoded and that is remembered.
        image = Image.fromarray(read_moment(size.ref, size.seen_px)[0].permute(1, 2, 0).numpy())
    elif size.ref.page is None and (quick := _jpeg_reduced(size)) is not None:
        image = quick
    else:
        image = open_image(size.ref)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return image


def _jpeg_reduced(size: ImageSize) -> Image.Image | None:
    """A plain JPEG decoded at a fraction of its size, which for a photograph takes a tenth of the time; else None."""
    assert not isinstance(size.ref, Moment)
    with open_undecoded(size.ref) as image:
        if image.format != "JPEG" or image.mode != "RGB":
            return None
        try:
            image.draft("RGB", (THUMBNAIL_PX, THUMBNAIL_PX))  # at least that large
            return ImageOps.exif_transpose(image)
        except PILLOW_FAULTS:  # cut off: open_image says so
            return None


def _encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
