"""Our headers are Pillow's, for every format, mode and orientation; and no bytes whatever make reading them fail badly."""

import io
import itertools
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from lensmith.data.headers import Header, _ask_pillow, read_header
from lensmith.data.images import open_image
from lensmith.data.parsers import Facts, Unclear, View, parse_header
from lensmith.errors import RowError
from lensmith.types import ImageRef

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow warns of what is bent here on purpose

MODES = {
    "JPEG": ("L", "RGB", "CMYK"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("L", "P", "RGBA"),
    "BMP": ("1", "L", "P", "RGB"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"),
}
OPTIONS = {
    "JPEG": (
        {},
        {"progressive": True},
        {"optimize": True, "quality": 30},
        {"comment": b"x" * 5000},
        {"icc_profile": b"p" * 70_000},
    ),
    "PNG": ({}, {"optimize": True}, {"icc_profile": b"profile"}, {"dpi": (72, 72)}),
    "WEBP": ({}, {"lossless": True}, {"quality": 10}, {"icc_profile": b"profile"}),
}
OURS = tuple(OPTIONS)


def drawn(mode: str, width: int = 37, height: int = 23) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    return Image.fromarray(values, "RGBA").convert("RGB" if mode in ("CMYK", "F", "P") else mode).convert(mode)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def ref(content: bytes) -> ImageRef:
    return ImageRef(content, "test")


def facts_of(header: Header) -> Facts:
    return Facts(*(getattr(header, name) for name in Facts._fields))


def parsed(content: bytes) -> Facts:
    """What our parser says by itself; it must not leave these to Pillow."""
    return parse_header(View(io.BytesIO(content)))


def exif_of(orientation: int, order: str = "<", *, entries: int = 0) -> bytes:
    """EXIF data with the orientation behind so many other entries."""
    head = b"II*\0" if order == "<" else b"MM\0*"
    tags = [struct.pack(order + "HHII", 0x0100 + number, 4, 1, 7) for number in range(entries)]
    tags.append(struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0))
    return b"Exif\0\0" + head + struct.pack(order + "IH", 8, len(tags)) + b"".join(tags) + b"\0\0\0\0"


def tags(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


PLAIN = [
    (kind, mode, options) for kind, modes in MODES.items() for mode in modes for options in OPTIONS.get(kind, ({},))
]


@pytest.mark.parametrize(("kind", "mode", "options"), PLAIN)
def test_every_format_and_mode_reads_as_pillow_reads_it(kind, mode, options):
    content = encoded(drawn(mode), kind, **options)
    header = read_header(ref(content))
    assert facts_of(header) == _ask_pillow(ref(content))
    assert (header.is_whole, header.num_bytes) == (True, len(content))
    if kind in OURS:
        assert parsed(content) == facts_of(header)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_reads_as_pillow_reads_it(kind, orientation):
    for order, entries in itertools.product("<>", (0, 3)):
        exif = exif_of(orientation, order, entries=entries)
        content = encoded(drawn("RGB"), kind, exif=exif if kind != "TIFF" else tags(orientation))
        header = read_header(ref(content))
        assert facts_of(header) == _ask_pillow(ref(content))
        assert header.upright_px == open_image(ref(content)).size[::-1]
        if kind in ("JPEG", "PNG"):
            assert parsed(content).orientation == (orientation if 1 <= orientation <= 8 else 1)


def test_orientation_may_stand_in_xmp_only():
    for tag in ('tiff:Orientation="6"', "<tiff:Orientation>6</tiff:Orientation>"):
        content = encoded(drawn("RGB"), "JPEG", xmp=f"<x {tag}/>".encode())
        assert parsed(content) == _ask_pillow(ref(content))
        assert read_header(ref(content)).orientation == 6
    both = encoded(drawn("RGB"), "JPEG", xmp=b'tiff:Orientation="6"', exif=exif_of(3))
    assert read_header(ref(both)).orientation == 3 == _ask_pillow(ref(both)).orientation


def test_a_camera_thumbnail_in_front_of_the_size_is_skipped():
    content = encoded(drawn("RGB"), "JPEG", exif=exif_of(8) + b"\0" * 60_000, icc_profile=b"p" * 200_000)
    assert parsed(content) == _ask_pillow(ref(content))
    assert read_header(ref(content)).upright_px == (37, 23)


def test_broken_exif_data_is_as_none():
    for exif in (b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"):
        content = encoded(drawn("RGB"), "JPEG", exif=exif)
        assert read_header(ref(content)).upright_px == (23, 37) == open_image(ref(content)).size[::-1]


def test_transparent_colours_and_deep_channels_are_seen():
    palette = encoded(drawn("P"), "PNG", transparency=3)
    assert parsed(palette) == _ask_pillow(ref(palette))
    header = read_header(ref(palette))
    assert (header.is_clear, header.is_palette, header.is_deep) == (True, True, False)
    assert read_header(ref(encoded(drawn("I;16"), "PNG"))).is_deep
    assert read_header(ref(encoded(drawn("CMYK"), "JPEG"))).is_cmyk
    for colours, channels in ((2, 3), (4, 2), (6, 4)):
        deep = bare_png(16, colours, b"\0" * (1 + 2 * 4 * channels) * 4)
        assert parsed(deep) == _ask_pillow(ref(deep))
        assert read_header(ref(deep)).is_deep


def bare_png(bits: int, colours: int, lines: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG of 4 x 4 pixels with these lines and further chunks."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 4, 4, bits, colours, 0, 0, 0)), *extra]
    chunks += [(b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def test_texts_and_unknown_chunks_of_a_png_change_nothing_unless_they_say_something():
    lines = b"\0" * 5 * 4
    plain = bare_png(8, 0, lines, (b"tEXt", b"Software\0painter"), (b"prVt", b"whatever"), (b"pHYs", b"\0" * 9))
    assert parsed(plain) == _ask_pillow(ref(plain)) == parsed(bare_png(8, 0, lines))
    told = PngImagePlugin.PngInfo()
    told.add_itxt("XML:com.adobe.xmp", 'tiff:Orientation="6"')
    assert read_header(ref(encoded(drawn("RGB"), "PNG", pnginfo=told))).orientation == 6
    raw = "\nexif\n    36\n" + exif_of(8).hex()
    hidden = bare_png(8, 0, lines, (b"tEXt", b"Raw profile type exif\0" + raw.encode()))
    assert read_header(ref(hidden)).orientation == 8


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_several_frames_are_seen(kind):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue", "green")]
    assert read_header(ref(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))).is_animated
    assert not read_header(ref(encoded(frames[0], kind))).is_animated


def test_a_photo_with_its_depth_map_is_one_picture():
    content = encoded(drawn("RGB"), "MPO", save_all=True, append_images=[drawn("RGB")])
    header = read_header(ref(content))
    assert (header.format, header.is_animated, header.is_whole) == ("MPO", False, True)


def test_what_is_cut_off_or_followed_by_something_is_not_whole():
    for kind in ("JPEG", "PNG"):
        content = encoded(drawn("RGB", 300, 200), kind)
        assert read_header(ref(content)).is_whole
        assert not read_header(ref(content[:-1])).is_whole
        assert not read_header(ref(content + b"more")).is_whole


SOUND = [
    encoded(drawn("RGB"), "JPEG", exif=exif_of(6), xmp=b"x", comment=b"c"),
    encoded(drawn("CMYK"), "JPEG", progressive=True),
    encoded(drawn("P"), "PNG", transparency=3, exif=exif_of(5, ">")[6:]),
    encoded(drawn("RGBA"), "PNG", icc_profile=b"profile"),
    encoded(drawn("RGB"), "WEBP"),
    encoded(drawn("RGBA"), "WEBP", lossless=True),
    encoded(drawn("RGBA"), "WEBP", quality=20),
    encoded(drawn("P"), "GIF"),
    encoded(drawn("P"), "BMP"),
    encoded(drawn("RGB"), "TIFF"),
]


def answer(ask: Callable[[], Facts], refusal: type[Exception]) -> Facts | None:
    try:
        return ask()
    except refusal:
        return None


def check_bytes(content: bytes) -> None:
    """Reading either fails with a RowError or says what Pillow says, unless Pillow refuses what it has no need to read."""
    ours = answer(lambda: parsed(content), Unclear)
    theirs = answer(lambda: _ask_pillow(ref(content)), RowError)
    told = answer(lambda: facts_of(read_header(ref(content))), RowError)
    assert told == theirs or (theirs is None and told in (None, ours))


@pytest.mark.parametrize("content", SOUND, ids=range(len(SOUND)))
def test_a_header_cut_off_anywhere_reads_as_pillow_reads_it_or_is_refused(content):
    for length in range(min(len(content), 700)):
        check_bytes(content[:length])


@settings(max_examples=400)
@given(st.sampled_from(SOUND), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4))
def test_bent_bytes_never_make_our_answer_differ_from_pillows(content, changes):
    bent = bytearray(content)
    for place, value in changes:
        bent[place % len(bent)] = value
    check_bytes(bytes(bent))


@settings(max_examples=200)
@given(st.sampled_from([content[:16] for content in SOUND]), st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(start, rest):
    check_bytes(start + rest)
