"""One picture looked at: what is wrong with it, what is odd about it, what it holds, and what it looks like.

Two pictures are the same where their files hold the same bytes, whatever they are called. They look the same where their
impressions are near: a difference hash of 64 bits (each says whether a cell of an 8 x 9 reduction is darker than its right
neighbour; N. Krawetz, "Kind of Like That", 2013) and the mean colour, to which that hash is blind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lensmith.check.keys import NOTHING, digest
from lensmith.data.images import MAX_ASPECT, open_image
from lensmith.data.places import open_ref
from lensmith.errors import RowError

if TYPE_CHECKING:
    from PIL import Image

    from lensmith.check.findings import Code
    from lensmith.data.headers import Header
    from lensmith.data.source import SampleSource
    from lensmith.types import ImageRef

HASH_PX = (9, 8)
"""Width and height that a picture is reduced to: 8 differences in each of 8 lines."""
LEAST_DETAIL = 8
"""Bits of a hash that must be set, and clear: plain surfaces and gradients all have the same hash, which proves nothing."""


class Impression(NamedTuple):
    """What a picture looks like, in 12 bytes."""

    bits: int
    """The difference hash."""
    colour: int
    """Mean red, green and blue as 0xRRGGBB."""

    @property
    def has_detail(self) -> bool:
        return LEAST_DETAIL <= self.bits.bit_count() <= 64 - LEAST_DETAIL


@dataclass(frozen=True, slots=True)
class Look:
    """Everything that one picture is told apart by."""

    header: Header | None
    """None where it cannot be read."""
    fault: RowError | None
    """Why it cannot be used."""
    oddities: tuple[tuple[Code, str], ...]
    """What is converted on reading, with a sentence each."""
    content: int
    """Digest of the file's bytes; NOTHING for a file that cannot be read."""
    impression: Impression | None
    """None where pixels were not decoded, or show too little to be told from another picture."""


def look_at(ref: ImageRef, source: SampleSource, *, decode: bool) -> Look:
    """Look at one picture; never raises for what is wrong with it.

    Args:
        source: where its row is from; remembers headers, so that measuring the row need not read them again.
        decode: every pixel and every byte, which finds any damage. Otherwise the header and the end mark are read, and
            the content is known by its size and ends.
    """
    header, content = None, NOTHING
    try:
        header = source.header(ref, check=not decode)
        content = digest_content(ref, header, whole=decode)
        picture = open_image(ref) if decode else None
        fault = _check_aspect(ref, header)
    except RowError as found:
        return Look(header, found, _oddities(header), content, None)
    impression = impression_of(picture) if picture is not None else None
    return Look(header, fault, _oddities(header), content, impression if impression and impression.has_detail else None)


def digest_content(ref: ImageRef, header: Header, *, whole: bool) -> int:
    """64 bits that stand for what the picture's file holds: all of it, or its size and the 4 KiB at both ends.

    A million different files have equal digests with a probability of 3e-8. Pages of a document that is not read as a
    whole go by its name.
    """
    page = b"" if ref.page is None else ref.page.to_bytes(8)
    if whole:
        with open_ref(ref) as file:
            return digest(file.read() + page)
    if page:
        return digest(ref.key.encode("utf-8", "surrogatepass"))
    return digest(header.num_bytes.to_bytes(8) + header.ends.to_bytes(8))


def impression_of(picture: Image.Image) -> Impression:
    """What an upright RGB picture looks like."""
    from PIL import Image

    small = np.asarray(picture.resize(HASH_PX, Image.Resampling.BOX), dtype=np.int16)
    grey = small.sum(axis=2)
    bits = np.packbits(grey[:, :-1] < grey[:, 1:])
    red, green, blue = small.mean(axis=(0, 1)).round().astype(int).tolist()
    return Impression(int.from_bytes(bits.tobytes()), red << 16 | green << 8 | blue)


def _check_aspect(ref: ImageRef, header: Header) -> RowError | None:
    """Here for every picture of a row; encoding stops at the first."""
    if max(header.upright_px) <= MAX_ASPECT * min(header.upright_px):
        return None
    height, width = header.upright_px
    what = f"is {width} x {height} px, longer than {MAX_ASPECT} : 1, which the model cannot see; crop it or cut it up."
    return RowError(str(ref), "extreme_aspect", what)


TURNS = {
    2: "is mirrored left to right",
    3: "stands on its head",
    4: "is mirrored top to bottom",
    5: "is mirrored and lies on its side",
    6: "lies on its left side",
    7: "is mirrored and lies on its side",
    8: "lies on its right side",
}
"""What a stored picture looks like without its EXIF orientation; values of the EXIF standard."""


def _oddities(header: Header | None) -> tuple[tuple[Code, str], ...]:
    if header is None:
        return ()
    found: list[tuple[Code, str]] = []
    if header.orientation in TURNS:
        stored = TURNS[header.orientation]
        found.append(
            ("exif_rotated", f"{stored} as stored (EXIF orientation {header.orientation}); it is seen upright.")
        )
    if kinds := _converted(header):
        found.append(("mode_converted", f"is a picture with {' and '.join(kinds)}; it is seen as 8-bit RGB."))
    if header.is_animated:
        found.append(("animated_image", f"is a {header.format} with several frames; the first is seen."))
    return tuple(found)


def _converted(header: Header) -> list[str]:
    told = {
        "a palette": header.is_palette,
        "transparency (laid on white)": header.is_clear,
        "CMYK colours": header.is_cmyk,
        "16 bits or more": header.is_deep,
    }
    return [kind for kind, holds in told.items() if holds]
