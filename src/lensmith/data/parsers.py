"""The first bytes of JPEG, PNG and WebP files, parsed as far as their pictures' facts go.

Each parser knows the common forms of its format and raises `Unclear` for the rest, also where a file is broken: Pillow
then decides. What a parser does answer is what Pillow would (tests/reference/test_headers.py).
"""

from __future__ import annotations

import io
import math
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

HEAD_BYTES = 4096
"""Read at once. Most headers are shorter; what a camera puts in front of its own, such as a thumbnail, is skipped over."""
TAIL_BYTES = 4096

ORIENTATION_TAG = 0x0112
"""In the EXIF standard."""
TURNED = range(2, 9)
"""Orientations that are not upright; 1 is, and the standard knows no others."""
SIDEWAYS = range(5, 9)
"""Those that swap height and width."""
XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
"""Where Pillow looks if EXIF data says nothing."""
XMP_LABEL = b"http://ns.adobe.com/xap/1.0/"


class Facts(NamedTuple):
    """What the parsers, or Pillow in their place, find out; the fields are those of `lensmith.data.headers.Header`."""

    format: str
    mode: str
    height: int
    width: int
    orientation: int = 1
    is_deep: bool = False
    is_clear: bool = False
    is_animated: bool = False


class Unclear(Exception):
    """Not a form that the parsers know well."""


class View:
    """Any bytes of a file, of which the first and the last ones are read at once."""

    __slots__ = ("_file", "head", "num_bytes", "tail")

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.head = file.read(HEAD_BYTES)
        self.num_bytes = len(self.head)
        self.tail = self.head[-TAIL_BYTES:]
        if self.num_bytes == HEAD_BYTES:
            self.num_bytes = file.seek(-TAIL_BYTES, io.SEEK_END) + TAIL_BYTES
            self.tail = file.read(TAIL_BYTES)

    def at(self, start: int, length: int) -> bytes:
        """Exactly so many bytes from there; unclear where the file is shorter."""
        content = self.head[start : start + length]
        if len(content) < length:
            self._file.seek(start)
            content = self._file.read(length)
            if len(content) < length:
                raise Unclear
        return content


def parse_header(view: View) -> Facts:
    """The facts of a picture in one of the three formats.

    Raises:
        Unclear: it is in another one, or not plainly in one of them.
    """
    for start, parse in PARSERS.items():
        if view.head.startswith(start):
            return parse(view)
    raise Unclear


SOF = (0xC0, 0xC1, 0xC2)
"""Start of a frame: baseline, extended or progressive, all three Huffman coded. Other kinds are hardly ever seen."""
DHT, SOS, DQT, DRI, COM = 0xC4, 0xDA, 0xDB, 0xDD, 0xFE
APP0, APP1, APP2, APP15 = 0xE0, 0xE1, 0xE2, 0xEF
SEGMENT_START = struct.Struct(">BBH")
"""Always 0xFF, the marker, and the length of what follows, these two bytes of it included."""
SEGMENTS = (*SOF, DHT, DQT, DRI, COM)
JPEG_MODES = {1: "L", 3: "RGB", 4: "CMYK"}
TABLE_BYTES = 65
"""Of a quantisation table of 8 bits: its number and 64 values."""


def _parse_jpeg(view: View) -> Facts:
    """Size and colours from the frame header, orientation from EXIF or XMP data: ITU-T T.81, annex B."""
    frame, notes = b"", {}
    for kind, start, length in _segments(view):
        if kind in SOF:
            frame = view.at(start, length)
        elif kind == DQT:
            _check_tables(view.at(start, length))
        elif kind == APP1:
            label, _, note = view.at(start, length).partition(b"\0")
            if label in notes or (label == b"Exif" and note[:1] != b"\0"):
                raise Unclear
            notes[label] = note
    if len(frame) < 6:
        raise Unclear
    bits, height, width, channels = struct.unpack_from(">BHHB", frame)
    if bits != 8 or channels not in JPEG_MODES or len(frame) != 6 + 3 * channels:
        raise Unclear
    orientation = _orientation(notes.get(b"Exif", b"")[1:], notes.get(XMP_LABEL, b"")) if notes else 1
    return Facts("JPEG", JPEG_MODES[channels], height, width, orientation)


def _segments(view: View) -> Iterator[tuple[int, int, int]]:
    """Marker, start and length of what each segment holds, up to the first scan."""
    place = 2
    while True:
        always, kind, length = SEGMENT_START.unpack(view.at(place, SEGMENT_START.size))
        if always != 0xFF or length < 2:
            raise Unclear
        if kind == SOS:
            return
        if not (kind in SEGMENTS or APP0 <= kind <= APP15):
            raise Unclear
        if kind == APP2 and length >= 6 and view.at(place + 4, 4) == b"MPF\0":
            raise Unclear  # several pictures in one file
        yield kind, place + 4, length - 2
        place += 2 + length


def _check_tables(tables: bytes) -> None:
    if len(tables) % TABLE_BYTES or any(number >> 4 for number in tables[::TABLE_BYTES]):
        raise Unclear


def _orientation(exif: bytes, xmp: bytes = b"") -> int:
    """1 to 8, from EXIF data (a TIFF file in small) or, where that says nothing, from XMP."""
    found = _exif_orientation(exif) if exif else None
    if found is None and (match := XMP_ORIENTATION.search(xmp)):
        found = int(match[1])
    return found if found is not None and found in TURNED else 1


def _exif_orientation(exif: bytes) -> int | None:
    """The tag's value in the first directory: TIFF 6.0, section 2."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 8:
        raise Unclear
    start = struct.unpack_from(order + "I", exif, 4)[0]
    if start + 2 > len(exif):
        raise Unclear
    num_entries = struct.unpack_from(order + "H", exif, start)[0]
    if start + 2 + 12 * num_entries > len(exif):
        raise Unclear
    found = None
    for tag, kind, count, value in struct.iter_unpack(order + "HHIHxx", exif[start + 2 : start + 2 + 12 * num_entries]):
        if tag == ORIENTATION_TAG:
            if (kind, count) != (3, 1) or found is not None:  # not one 16-bit number
                raise Unclear
            found = value
    return found


PNG_MODES = {
    (1, 0): "1", (2, 0): "L", (4, 0): "L", (8, 0): "L", (16, 0): "I;16",
    (8, 2): "RGB", (16, 2): "RGB",
    (1, 3): "P", (2, 3): "P", (4, 3): "P", (8, 3): "P",
    (8, 4): "LA", (16, 4): "RGBA",
    (8, 6): "RGBA", (16, 6): "RGBA",
}  # fmt: skip
"""Pillow's mode by bits per channel and colour type."""
TRANSPARENCY_BYTES = {"1": 2, "L": 2, "I;16": 2, "RGB": 6, "P": 1}
"""Least length of a tRNS chunk; a mode with alpha has none."""
PLAIN_KEYWORDS = (
    b"Title", b"Author", b"Description", b"Copyright", b"Creation Time", b"Software", b"Disclaimer", b"Warning",
    b"Source", b"Comment", b"date:create", b"date:modify", b"date:timestamp", b"parameters", b"prompt", b"workflow",
)  # fmt: skip
"""Of text chunks that say nothing about the picture, as PNG defines them and others write them; EXIF data hides in some."""
IHDR_BYTES = 13
UNCLEAR_CHUNKS = (b"acTL", b"fcTL", b"fdAT", b"zTXt", b"iTXt", b"IEND", b"IHDR")


def _parse_png(view: View) -> Facts:
    """Chunk after chunk up to the first of pixels, checksums included as in Pillow: PNG, third edition, section 5."""
    place, content = _chunk(view, 8, b"IHDR")
    width, height, bits, colours, _, filters, _ = struct.unpack(">IIBBBBB", content)
    mode = PNG_MODES.get((bits, colours))
    if mode is None or filters:
        raise Unclear
    is_clear, exif = mode in ("LA", "RGBA"), b""
    while (kind := view.at(place + 4, 4)) != b"IDAT":
        if kind in UNCLEAR_CHUNKS or not (kind.isalnum() and kind.isascii()):
            raise Unclear
        place, content = _chunk(view, place, kind)
        if kind == b"tRNS":
            if len(content) < TRANSPARENCY_BYTES.get(mode, math.inf):
                raise Unclear
            is_clear = True
        elif kind == b"eXIf":
            exif = content
        elif kind == b"tEXt" and content.partition(b"\0")[0] not in PLAIN_KEYWORDS:
            raise Unclear
    return Facts("PNG", mode, height, width, _orientation(exif), is_deep=bits > 8, is_clear=is_clear)


def _chunk(view: View, start: int, kind: bytes) -> tuple[int, bytes]:
    """Where the next chunk starts, and the content of this one."""
    length = int.from_bytes(view.at(start, 4))
    if kind == b"IHDR" and length != IHDR_BYTES:
        raise Unclear
    whole = view.at(start + 4, length + 8)
    content = whole[4:-4]
    if whole[:4] != kind or zlib.crc32(whole[:-4]) != int.from_bytes(whole[-4:]):
        raise Unclear
    return start + 12 + length, content


ALPHA_FLAG = 0x10
UNCLEAR_FLAGS = 0x02 | 0x04 | 0x08
"""Of an extended WebP file: it is animated, or holds XMP or EXIF data, which lie behind the pixels."""


def _parse_webp(view: View) -> Facts:
    """The three kinds of WebP: RFC 9649, section 2, with the frame headers of RFC 6386 (lossy) and section 3 (lossless)."""
    start = view.at(0, 30)
    if start[8:12] != b"WEBP" or int.from_bytes(start[4:8], "little") + 8 > view.num_bytes:
        raise Unclear
    kind, flags = start[12:16], 0
    if kind == b"VP8 " and start[23:26] == b"\x9d\x01\x2a" and not start[20] & 1:
        width, height = (side & 0x3FFF for side in struct.unpack("<HH", start[26:30]))
    elif kind == b"VP8L" and start[20] == 0x2F:
        bits = int.from_bytes(start[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        flags = ALPHA_FLAG if bits >> 28 & 1 else 0
    elif kind == b"VP8X" and not start[20] & UNCLEAR_FLAGS:
        flags = start[20]
        width, height = (1 + int.from_bytes(start[place : place + 3], "little") for place in (24, 27))
    else:
        raise Unclear
    is_clear = bool(flags & ALPHA_FLAG)
    if kind == b"VP8X" and not is_clear and view.at(30, 4) == b"ALPH":
        raise Unclear  # it has what its flags deny
    return Facts("WEBP", "RGBA" if is_clear else "RGB", height, width, is_clear=is_clear)


PARSERS: dict[bytes, Callable[[View], Facts]] = {
    b"\xff\xd8\xff": _parse_jpeg,
    b"\x89PNG\r\n\x1a\n": _parse_png,
    b"RIFF": _parse_webp,
}
"""By what the file starts with."""
