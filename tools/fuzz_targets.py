"""What tools/fuzz.py feeds: each reader with good inputs to bend, and the words of its format."""

from __future__ import annotations

import base64
import functools
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lensmith.config.tree import Columns
from lensmith.data.documents import draw_page, read_pages, split_pages
from lensmith.data.headers import read_header
from lensmith.data.images import open_image
from lensmith.data.json_text import NotJson, parse_json
from lensmith.data.layout import Layout, guess_layout
from lensmith.data.refs import RefReader
from lensmith.data.rows import open_rows
from lensmith.data.samples import to_sample
from lensmith.errors import RowError
from lensmith.types import ImageRef, Row, Sample

MOST_ROWS = 30
"""Rows read of each file."""


@dataclass(frozen=True, slots=True)
class Target:
    """A reader that must take any bytes, or refuse them by one of our own errors."""

    name: str
    read: Callable[[bytes, Path], Any]
    """Given the bytes and a folder of its own."""
    inputs: tuple[bytes, ...]
    words: tuple[bytes, ...] = ()


def picture(kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (24, 16), **options: Any) -> bytes:
    """A small picture with something in it."""
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


# --- rows ---------------------------------------------------------------------------------------------------------------

BOX = '[{"bbox_2d": [1, 2, 30, 40], "label": "cat"}]'
CHATS: tuple[dict[str, Any], ...] = (
    {"messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cat."}],
        "images": ["a.png"]},
    {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt",
        "value": "<think>x</think>A"}]},
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "sub/b.jpg"}, {"type": "text", "text": "Where?"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": BOX}]}]},
    {"messages": json.dumps([{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant",
        "content": "a"}])},
    {"video": "v.mp4", "messages": [{"role": "user", "content": "<video>?"}, {"role": "assistant", "content": "a"}]},
    {"messages": [{"role": "user", "content": [{"type": "video", "video": ["a.png", "a.png"], "fps": 2.0, "timestamps": [0,
        1]}]},
                  {"role": "assistant", "content": "a"}]},
)  # fmt: skip
TABLES: tuple[dict[str, Any], ...] = (
    {"image": "a.png", "question": "What?", "answer": "A cat."},
    {
        "image": ["a.png", "zip.zip/in.png"],
        "question": "<image><image>?",
        "answer": BOX,
        "system": "s",
        "extra": [1, None],
    },
    {"image": {"bytes": None, "path": "a.png"}, "question": "?", "answer": 4},
    {"image": "d.pdf#page=1-2", "question": "?", "answer": "x"},
    {"image": "data:image/png;base64," + base64.b64encode(picture()).decode(), "question": "?", "answer": "x"},
    {"image": "a.png; sub/b.jpg", "question": "?", "answer": True},
    {"image": None, "question": "2 + 2?", "answer": 4.0},
)
DETECTIONS: tuple[dict[str, Any], ...] = (
    {
        "images": [{"id": 1, "file_name": "a.png", "height": 16, "width": 24}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [1, 2, 3, 4], "iscrowd": 0}],
        "categories": [{"id": 7, "name": "cat"}],
    },
    {
        "version": "5.0",
        "shapes": [{"label": "cat", "points": [[1, 2], [3, 4]], "shape_type": "rectangle"}],
        "imagePath": "a.png",
        "imageHeight": 16,
        "imageWidth": 24,
    },
)
"""COCO and LabelMe."""
JSON_WORDS = (
    b"\\ud800", b"\\u0000", b"\\uDC00", b"null", b"NaN", b"1e999", b'"<image>"', b"<image>", b"<think>", b"</think>",
    b'"role"',
    b"[" * 2000, b'{"a":' * 2000, b"9" * 5000, b"9" * 400, b"../", b"/etc/passwd", b"a.png", b"zip.zip/", b"#page=1-99999999",
    b"http://127.0.0.1/", b"file://", b"s3://x/y", b"hf://datasets/x", b"gs://", b"data:", b";", b'"type"', b'"video"',
    b'"image_url"',
    b"-1", b"true", b"<|im_start|>", b"<|image_pad|>", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\x0c", b"\x85", b"\xe2\x80\xa8",
)  # fmt: skip


def furnish(folder: Path) -> Path:
    """The files that good rows name."""
    if not (folder / "a.png").exists():
        (folder / "sub").mkdir()
        (folder / "sub" / "b.jpg").write_bytes(picture("JPEG"))
        (folder / "d.pdf").write_bytes(PDFS[0])
        (folder / "zip.zip").write_bytes(ZIPS[0])
        (folder / "v.mp4").write_bytes(VIDEO)
        (folder / "a.png").write_bytes(picture())
    return folder


def read_file(name: str, content: bytes, folder: Path) -> None:
    """All that happens to a data file before training, but for tokens."""
    (furnish(folder) / name).write_bytes(content)
    rows = open_rows(folder / name)
    layout = guess_layout(rows, Columns())
    refs = RefReader(folder)
    fault = None
    for number in range(min(len(rows), MOST_ROWS)):
        try:
            see(to_sample(rows[number], layout, refs, reasoning="drop" if number % 2 else "keep"))
        except RowError as error:
            fault = error
    if fault is not None:
        raise fault


def see(sample: Sample) -> None:
    """What encoding needs of a sample: texts that are Unicode, pictures with a size, boxes."""
    from lensmith.data.box_evidence import audit_boxes

    for message in sample.messages:
        message.text.encode()
    for ref in sample.images:
        read_header(ref)
    audit_boxes(sample, [], None)


def read_cell(content: bytes, folder: Path) -> None:
    """One value, wherever a row may hold one."""
    try:
        cell = parse_json(content.decode("utf-8", "replace"))
    except NotJson:
        cell = content.decode("utf-8", "replace")
    refs = RefReader(furnish(folder))
    faults: list[RowError] = []
    for layout in LAYOUTS:
        for fields in (
            {"image": cell, "question": "?", "answer": "x"},
            {"image": "a.png", "question": cell, "answer": cell},
        ):
            try:
                see(to_sample(Row("r:1", fields), layout, refs, reasoning="drop"))
            except RowError as fault:
                faults.append(fault)
        for key in ("messages", "conversations"):
            fields = cell if isinstance(cell, Mapping) else {key: cell, "images": ["a.png"]}
            found: list[RowError] = []
            try:
                to_sample(Row("r:1", fields), layout, refs, faults=found)
            except RowError as fault:
                faults.append(fault)
            faults += found
    if faults:
        raise faults[0]


LAYOUTS = (
    Layout("table", None, ("image",), "question", "answer", None, ""),
    Layout("messages", "messages", ("images",), None, None, "system", ""),
    Layout("conversations", "conversations", ("image",), None, None, None, ""),
)


def read_boxes(content: bytes, _: Path) -> None:
    """Boxes in a text: found, moved, and back."""
    from lensmith.data.box_text import find_boxes, rewrite_boxes

    text = content.decode("utf-8", "replace")
    for bare in (False, True):
        found = find_boxes(text, bare=bare)
        moved = rewrite_boxes(text, lambda span: [number / 2 for number in span.numbers], bare=bare)
        assert len(find_boxes(moved, bare=bare)) == len(found), "moving boxes must not lose any"


# --- pictures, documents, archives --------------------------------------------------------------------------------------


def read_picture(content: bytes, _: Path) -> None:
    """Header and pixels, which must agree."""
    ref = ImageRef(content, "fuzz")
    header = read_header(ref)
    if header.width * header.height > 4_000_000:
        return  # decoding takes what it takes
    opened = open_image(ref)
    assert opened.size == header.upright_px[::-1], f"header says {header.upright_px}, pixels {opened.size[::-1]}"


def read_document(content: bytes, folder: Path) -> None:
    """Pages counted, and the first drawn."""
    (folder / "fuzz.pdf").write_bytes(content)
    name, pages = split_pages(str(folder / "fuzz.pdf"))
    for document in (ImageRef(Path(name), f"{hash(content)}"), ImageRef(content, f"bytes {hash(content)}")):
        refs = read_pages(document, pages or (1, None), "r:1")
        height, width = read_header(refs[0]).upright_px
        if height * width < 4_000_000:
            draw_page(refs[0], limit_s=1)


def read_archive(content: bytes, folder: Path) -> None:
    """A picture in a .zip."""
    (folder / "fuzz.zip").write_bytes(content)
    for ref in RefReader(folder).read("fuzz.zip/in.png", "r:1")[0]:
        open_image(ref)


def read_name(content: bytes, folder: Path) -> None:
    """Anything as a path: it is inside the root, or refused."""
    name = content.decode("utf-8", "surrogateescape")
    for entry in RefReader(furnish(folder)).read(name, "r:1"):
        for ref in entry:
            if isinstance(ref.source, Path):
                assert ref.source.resolve().is_relative_to(folder.resolve()), (
                    f"{name!a} leads to {ref.source.resolve()}"
                )


def pdf(pages: int) -> bytes:
    buffer = io.BytesIO()
    first, *rest = [Image.new("RGB", (40, 30), "red") for _ in range(pages)]
    first.save(buffer, "PDF", save_all=True, append_images=rest)
    return buffer.getvalue()


def archive(kind: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as file:
        file.writestr("in.png", picture())
        file.writestr("../out.png", picture())
    return buffer.getvalue()


def heic() -> bytes:
    import pillow_heif

    buffer = io.BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (64, 64), "red")).save(buffer)
    return buffer.getvalue()


def video() -> bytes:
    """Half a second of two colours."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for number in range(4):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 60 * number, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def read_video(content: bytes, folder: Path) -> None:
    """Header of a film: its frames are counted."""
    from lensmith.data.video import read_header as read_video_header
    from lensmith.types import VideoRef

    (folder / "fuzz.mp4").write_bytes(content)
    read_video_header(VideoRef(ImageRef(folder / "fuzz.mp4", f"{hash(content)}"), f"{hash(content)}"))


EXIF = Image.Exif()
EXIF[0x0112] = 6
PDFS = (pdf(3), pdf(1))
VIDEO = video()
ZIPS = (archive(zipfile.ZIP_STORED), archive(zipfile.ZIP_DEFLATED))
PICTURES = (
    picture("PNG"), picture("PNG", "P"), picture("PNG", "LA"), picture("PNG", "1"), picture("PNG", "RGBA", exif=EXIF),
    picture("JPEG"), picture("JPEG", "L"), picture("JPEG", "CMYK"), picture("JPEG", exif=EXIF, progressive=True,
    comment=b"x" * 40),
    picture("GIF"), picture("WEBP"), picture("WEBP", "RGBA", lossless=True, exif=EXIF), picture("BMP"), picture("BMP", "1"),
    picture("TIFF"), picture("TIFF", "F"), picture("TIFF", compression="tiff_lzw", exif=EXIF), picture("AVIF"), heic(),
    picture("PPM"), picture("ICO"), picture("TGA"), picture("JPEG2000"), picture("PCX"), picture("DDS"), picture("ICNS",
    size=(32, 32)),
)  # fmt: skip
PICTURE_WORDS = (
    b"IHDR", b"IDAT", b"IEND", b"tRNS", b"eXIf", b"acTL", b"PLTE", b"\xff\xd8", b"\xff\xc0", b"\xff\xc2",
    b"\xff\xe1\0\x10Exif\0\0",
    b"\xff\xda", b"\xff\xd9", b"\xff\xee\0\x0eAdobe", b"MM\0*", b"II*\0", b"VP8 ", b"VP8L", b"VP8X", b"ANIM", b"GIF89a",
    b"ftypheic",
    b"ftypavif", b"mif1", b"\x12\x01\x03\0\x01\0\0\0\x06",
)  # fmt: skip
PATHS = (
    b"a.png",
    b"sub/b.jpg",
    b"sub/../a.png",
    b"./a.png",
    b"zip.zip/in.png",
    b"d.pdf#page=2",
    b"../a.png",
    b"/etc/passwd",
    b"file://a.png",
)
PATH_WORDS = (
    b"../",
    b"/",
    b"\\",
    b"//",
    b"..",
    b".",
    b"%2e%2e/",
    b"\0",
    b"\n",
    b"~",
    b"file://",
    b"zip.zip/",
    b"d.pdf",
    b";",
    b"s3://",
    b"::",
    b"#page=",
)


def lines(rows: tuple[dict[str, Any], ...]) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def table(separator: str, quote: str = '"') -> bytes:
    cells = [["image", "question", "answer"], ["a.png", f"{quote}a\nb{quote}", "x"], ["sub/b.jpg", "", "y"]]
    return "\r\n".join(separator.join(row) for row in cells).encode()


BOX_TEXTS = (
    BOX.encode(), f"```json\n{BOX}\n```".encode(), b"[1, 2, 3, 4]", b'{"point_2d": [1.5, 2e2]}',
    b'{"boxes": [[1,2,3,4],[5,6,7,8]]}',
    b"<|box_start|>(1,2),(3,4)<|box_end|>", b'{"bbox_2d": [1, 2, 3, 4], "image_index": 1}',
)  # fmt: skip
BOX_WORDS = (
    b"[[",
    b"]]",
    b"[",
    b"(",
    b'"bbox_2d":',
    b"1e308",
    b"-0.",
    b"1.",
    b".5",
    b"," * 50,
    b"<|box_start|>",
    b"1,",
    b"\xd9\xa1",
    b"[1,2,3,4]",
)

ROWS = (*CHATS, *TABLES)
TABLE_TEXTS = (table(","), table(";"), table("\t"), table(",", ""))
TABLE_WORDS = (b'"', b'""', b",", b"\t", b"\r", b"\0", b"\n\n", *JSON_WORDS)
CELLS = tuple(json.dumps(value).encode() for row in ROWS for value in (row, *row.values()))
PDF_WORDS = (b"/Count 999999999", b"/MediaBox [0 0 1e9 1e9]", b"/Encrypt", b"/Kids", b"endobj", b"%PDF-")
ZIP_WORDS = (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"in.png", b"\xff\xff\xff\x7f")
VIDEO_WORDS = (b"moov", b"stts", b"stsz", b"tkhd", b"mdat", b"\xff\xff\xff\xff")


def file_target(name: str, inputs: Iterable[bytes], words: tuple[bytes, ...]) -> Target:
    return Target(name, functools.partial(read_file, f"rows.{name}"), tuple(inputs), words)


TARGETS: tuple[Target, ...] = (
    file_target("jsonl", (lines((row, row)) for row in ROWS), JSON_WORDS),
    file_target(
        "json", (json.dumps(rows).encode() for rows in (*([row, row] for row in ROWS), *DETECTIONS)), JSON_WORDS
    ),
    file_target("csv", TABLE_TEXTS, TABLE_WORDS),
    file_target("tsv", (table("\t"),), TABLE_WORDS),
    Target("cell", read_cell, CELLS, JSON_WORDS),
    Target("path", read_name, PATHS, PATH_WORDS),
    Target("picture", read_picture, PICTURES, PICTURE_WORDS),
    Target("pdf", read_document, PDFS, PDF_WORDS),
    Target("zip", read_archive, ZIPS, ZIP_WORDS),
    Target("boxes", read_boxes, BOX_TEXTS, BOX_WORDS),
    Target("video", read_video, (VIDEO,), VIDEO_WORDS),
)
