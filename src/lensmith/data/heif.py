"""HEIC and AVIF, the formats that need something installed: Pillow reads AVIF where it was built so, HEIC by a plug-in.

Both can turn a picture in two places, the container's own transformation and the EXIF tag that says the same. Pillow's
AVIF hands out stored pixels with the tag; pillow-heif hands out upright pixels and sets the tag to upright. Either way the
tag that `lensmith.data.images` reads is what is left to turn (tests/unit/test_heif.py).
"""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, UnidentifiedImageError, features

from lensmith.errors import RowError

HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
AVIF_BRANDS = (b"avif", b"avis")
"""What follows `ftyp` in the first box of the file (ISO/IEC 23008-12, and the AVIF specification)."""


def open_picture(location: Path | io.BytesIO, where: str) -> Image.Image:
    """`Image.open`, with the HEIC plug-in where the file needs it.

    Raises:
        RowError: `unreadable_image` where what the format needs is not installed; all that Pillow raises besides.
    """
    try:
        return Image.open(location)
    except UnidentifiedImageError:
        brand = _brand(location)
        if brand in AVIF_BRANDS and not features.check("avif"):
            sentence = "is AVIF, which this Pillow was built without; pip install -U pillow, or convert it to JPEG."
            raise RowError(where, "unreadable_image", sentence) from None
        if brand not in HEIC_BRANDS or not _register_heic(where):
            raise
    return Image.open(location)


def _brand(location: Path | io.BytesIO) -> bytes | None:
    if isinstance(location, Path):
        with location.open("rb") as file:
            start = file.read(12)
    else:
        start = location.getvalue()[:12]
        location.seek(0)
    return start[8:12] if start[4:8] == b"ftyp" else None


def _register_heic(where: str) -> bool:
    """Teach Pillow HEIC; False where it already knew."""
    try:
        import pillow_heif
    except ImportError as cause:
        raise RowError(
            where,
            "unreadable_image",
            "is HEIC, which needs pillow-heif, and that is not installed; pip install 'lensmith[heic]', "
            "or convert it to JPEG.",
        ) from cause
    if "HEIF" in Image.OPEN:
        return False
    pillow_heif.register_heif_opener()
    return True
