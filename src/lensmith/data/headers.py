"""What a picture's file says before a pixel is decoded: size, orientation, colours, and whether its end is there.

JPEG, PNG and WebP are parsed by `lensmith.data.parsers`; other formats, and whatever is odd in these three, are left to
Pillow. Both ways give the same answer, ours in a fraction of the time: reading the headers of a million pictures is then a
matter of seconds.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from lensmith.data.documents import page_px
from lensmith.data.heif import open_picture
from lensmith.data.parsers import ORIENTATION_TAG, SIDEWAYS, TURNED, Facts, Unclear, View, parse_header
from lensmith.data.places import open_ref
from lensmith.errors import RowError
from lensmith.types import ImageRef

END_MARKS = {b"\xff\xd8\xff": b"\xff\xd9", b"\x89PNG": b"IEND\xaeB`\x82"}
"""First and last bytes of a whole file: JPEG's SOI and EOI markers; PNG's signature and IEND chunk with its checksum."""

SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
DEEP_MODES = (*SIXTEEN_BIT_MODES, "I", "F")
"""Pillow's modes of more than 8 bits per channel, all of them greys; colours of 16 bits it reduces to 8 by itself."""

PILLOW_FAULTS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    RuntimeError,
    ArithmeticError,
    struct.error,
)
"""What Pillow raises on broken files: its plug-ins name their faults, or stumble over them."""


@dataclass(frozen=True, slots=True)
class Header:
    """One picture as its file describes it."""

    format: str
    """Pillow's name for it: JPEG, PNG, WEBP, GIF, TIFF, MPO, ...; PDF for the page of a document."""
    mode: str
    """Pillow's mode of its pixels: RGB, L, P, CMYK, ..."""
    height: int
    """In pixels, as stored."""
    width: int
    orientation: int
    """EXIF orientation, 1 to 8. 1 is upright, and stands for none or an unknown one too."""
    is_deep: bool
    """More than 8 bits per channel."""
    is_clear: bool
    """Has an alpha channel or a transparent colour."""
    is_animated: bool
    """Has several frames or pages, of which the first is seen."""
    is_whole: bool
    """False for a JPEG or PNG without its end mark in place: cut off, or followed by something. Decoding tells which."""
    num_bytes: int
    """Of the file; 0 for the page of a document."""
    ends: int
    """Checksums of its first and last 4 KiB, 64 bits: equal for copies. 0 for the page of a document."""

    @property
    def upright_px(self) -> tuple[int, int]:
        """Height and width, after the EXIF rotation."""
        return (self.width, self.height) if self.orientation in SIDEWAYS else (self.height, self.width)

    @property
    def is_palette(self) -> bool:
        return self.mode in ("P", "PA")

    @property
    def is_cmyk(self) -> bool:
        return self.mode == "CMYK"


def read_header(ref: ImageRef) -> Header:
    """What the file says of itself; no pixel is decoded.

    Raises:
        RowError: `missing_file`, `unreadable_image`, `decompression_bomb`, or `unreadable_document` for a page.
    """
    try:
        if ref.page is not None:
            return Header("PDF", "RGB", *page_px(ref), 1, False, False, False, True, 0, 0)
        with open_ref(ref) as file:
            view = View(file)
            facts = _parse(view)
    except FileNotFoundError as cause:
        raise _gone(ref) from cause
    except OSError as cause:
        raise _unreadable(ref, cause) from cause
    facts = facts or _ask_pillow(ref)
    mark = next((end for start, end in END_MARKS.items() if view.head.startswith(start)), b"")
    ends = zlib.crc32(view.head) << 32 | zlib.crc32(view.tail)
    return Header(*facts, view.tail.endswith(mark), view.num_bytes, ends)


def _parse(view: View) -> Facts | None:
    """What our own parsers answer; None leaves the question to Pillow."""
    try:
        facts = parse_header(view)
    except Unclear:
        return None
    # Pillow warns of more pixels and refuses twice as many: it has the words for both.
    return facts if 0 < facts.height * facts.width <= (Image.MAX_IMAGE_PIXELS or math.inf) else None


def _ask_pillow(ref: ImageRef) -> Facts:
    with open_undecoded(ref) as image:
        try:
            is_animated = getattr(image, "is_animated", False)
        except PILLOW_FAULTS:
            is_animated = False  # broken behind the first frame, which is the one that is seen
        width, height = image.size
        raw_mode = str(getattr(image, "tile", ()))
        return Facts(
            image.format or "",
            image.mode,
            height,
            width,
            orientation_of(image),
            is_deep=image.mode in DEEP_MODES or ";16" in raw_mode,
            is_clear=not {"A", "a"}.isdisjoint(image.getbands()) or "transparency" in image.info,
            # Several pictures in one MPO are one photograph: a phone's depth or brightness map lies behind it.
            is_animated=is_animated and image.format != "MPO",
        )


def open_undecoded(ref: ImageRef) -> Image.Image:
    """The picture as Pillow opens it, its pixels still on disk.

    Raises:
        RowError: `missing_file`, `unreadable_image` or `decompression_bomb`.
    """
    with reporting_gone(ref):
        location = _location(ref)
        try:
            return open_picture(location, str(ref))
        except FileNotFoundError:
            raise
        except Image.DecompressionBombError as cause:
            raise bomb(ref, cause) from cause
        except (UnidentifiedImageError, *PILLOW_FAULTS) as cause:
            raise _unreadable(ref, cause, is_empty=_num_bytes(location) == 0) from cause


def orientation_of(image: Image.Image) -> int:
    """1 to 8, as in `Header.orientation`, of a picture that Pillow has opened."""
    if image.format == "TIFF":
        return 1  # the one format that Pillow turns by itself
    try:
        # PngImageFile.getexif decodes the whole picture to look for EXIF data behind it; the plain method does not.
        exif = Image.Image.getexif(image) if image.format == "PNG" else image.getexif()
        found = exif.get(ORIENTATION_TAG)
    except PILLOW_FAULTS:
        return 1  # broken EXIF data: viewers ignore it too, and show the picture as it is stored
    return found if found is not None and found in TURNED else 1


def bomb(ref: ImageRef, cause: Exception) -> RowError:
    """What to say of a picture that is small on disk and too large to decode."""
    return RowError(
        str(ref),
        "decompression_bomb",
        f"the picture unfolds to an unreasonable size ({cause}); reduce it, or remove the row.",
    )


@contextmanager
def reporting_gone(ref: ImageRef) -> Iterator[None]:
    """A file that has vanished since the row was read, as a RowError."""
    try:
        yield
    except FileNotFoundError as cause:
        raise _gone(ref) from cause


def _gone(ref: ImageRef) -> RowError:
    return RowError(str(ref), "missing_file", "there is no such file.")


def _unreadable(ref: ImageRef, cause: Exception, *, is_empty: bool = False) -> RowError:
    what = "is empty (0 bytes)" if is_empty else "is not a picture that Pillow can read"
    return RowError(str(ref), "unreadable_image", f"the file {what}; convert it to PNG or JPEG, or remove the row.")


def _location(ref: ImageRef) -> Path | io.BytesIO:
    """What Pillow opens; a path where there is one, since it then closes the file itself."""
    if isinstance(ref.source, Path) and ref.member is None:
        return ref.source
    with open_ref(ref) as file:
        return io.BytesIO(file.read())


def _num_bytes(location: Path | io.BytesIO) -> int:
    return location.stat().st_size if isinstance(location, Path) else len(location.getbuffer())
