"""A page of a PDF is a picture like any other: its size is known without drawing it, and it is drawn as large as said."""

import io
import json
import sys
import time

import numpy as np
import pytest
from PIL import Image

from lensmith.config.tree import Data, Images
from lensmith.data.documents import MAX_PAGES, PAGE_DPI, draw_page, split_pages
from lensmith.data.encode import Encoder
from lensmith.data.images import check_whole, header_px, open_image, read_patches
from lensmith.data.refs import RefReader
from lensmith.data.source import open_source, read_samples
from lensmith.errors import RowError

A4 = (595.28, 841.89)
"""Width and height in points of 1/72 inch."""


def pdf(*pages: tuple[float, float], turn: int = 0, **extra: str) -> bytes:
    """A PDF with a red rectangle in the lower left quarter of each page; sizes in points."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>"]
    first = 3
    kids = " ".join(f"{first + 2 * number} 0 R" for number in range(len(pages)))
    objects.append(f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>")
    for number, (width, height) in enumerate(pages):
        content = f"1 0 0 rg 0 0 {width / 2} {height / 2} re f"
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {width} {height}] /Rotate {turn} "
            f"/Contents {first + 2 * number + 1} 0 R >>"
        )
        objects.append(f"<< /Length {len(content)} >>\nstream\n{content}\nendstream")
    out, places = io.BytesIO(), []
    out.write(b"%PDF-1.7\n")
    for number, text in enumerate(objects, 1):
        places.append(out.tell())
        out.write(f"{number} 0 obj\n{text}\nendobj\n".encode())
    start = out.tell()
    out.write(f"xref\n0 {len(places) + 1}\n0000000000 65535 f \n".encode())
    out.writelines(b"%010d 00000 n \n" % place for place in places)
    entries = "".join(f" /{name} {value}" for name, value in extra.items())
    out.write(f"trailer\n<< /Size {len(places) + 1} /Root 1 0 R{entries} >>\nstartxref\n{start}\n%%EOF".encode())
    return out.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "report.pdf").write_bytes(pdf(A4, (300, 200), (100, 400.3), A4, A4))
    return tmp_path


def fault(action) -> RowError:
    with pytest.raises(RowError) as caught:
        action()
    return caught.value


def pages_of(folder, name):
    return [ref for entry in RefReader(folder).read(name, "rows.jsonl:1") for ref in entry]


def test_document_becomes_one_picture_per_page(folder):
    pages = pages_of(folder, "report.pdf")
    assert [(page.source, page.page) for page in pages] == [(folder / "report.pdf", n) for n in range(1, 6)]
    assert pages[2].key == f"{folder}/report.pdf#page=3"
    assert str(pages[2]) == f"{folder}/report.pdf#page=3"
    assert [page.page for page in pages_of(folder, "report.pdf#page=2-4")] == [2, 3, 4]
    assert [page.page for page in pages_of(folder, "REPORT/../report.pdf#page=3")] == [3]
    assert [page.page for page in pages_of(folder, "report.pdf#page=1;report.pdf#page=5")] == [1, 5]
    assert pages_of(folder, (folder / "report.pdf").read_bytes())[3].page == 4


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_size_is_known_without_drawing_and_right(tmp_path, turn):
    (tmp_path / "a.pdf").write_bytes(pdf(A4, (300, 200), (100.01, 400.3), turn=turn))
    for ref, points in zip(pages_of(tmp_path, "a.pdf"), [A4, (300, 200), (100.01, 400.3)], strict=True):
        width, height = points if turn in (0, 180) else points[::-1]
        assert header_px(ref) == pytest.approx((height * PAGE_DPI / 72, width * PAGE_DPI / 72), abs=1)
        assert open_image(ref).size == header_px(ref)[::-1]
        check_whole(ref)


def test_page_is_drawn_in_rgb_on_white(folder):
    drawn = open_image(pages_of(folder, "report.pdf#page=2")[0])
    assert (drawn.mode, drawn.size) == ("RGB", (600, 400))
    assert drawn.getpixel((10, 390)) == (255, 0, 0)
    assert drawn.getpixel((590, 390)) == drawn.getpixel((10, 10)) == (255, 255, 255)


def test_pages_are_encoded_within_the_token_budget(folder, processor):
    (folder / "rows.jsonl").write_text(json.dumps({"image": "report.pdf#page=1-2", "question": "Sum?", "answer": "3"}))
    encoder = Encoder.from_processor(processor, Images(max_tokens=200))
    encoded = open_source(Data(train=str(folder / "rows.jsonl")), encoder, which="train").encoded(0)
    assert [image.original_px for image in encoded.images] == [(1684, 1191), (400, 600)]
    assert encoded.images[0].tokens <= 200
    for image in encoded.images:
        patches = read_patches(image, encoder.geometry)
        assert len(patches) == image.tokens * encoder.geometry.merge**2
        assert np.isfinite(patches.numpy()).all()


def test_a_mark_stands_for_the_document_or_for_a_page(folder):
    def parts(text: str, image: str = "report.pdf#page=1-3") -> list:
        row = {"image": image, "question": text, "answer": "x"}
        (folder / "rows.jsonl").write_text(json.dumps(row))
        return [getattr(part, "index", "text") for part in read_samples(folder / "rows.jsonl")[0].messages[0].parts]

    assert parts("What?") == [0, 1, 2, "text"]
    assert parts("Read <image> and answer") == ["text", 0, 1, 2, "text"]
    assert parts("<image>then<image>then<image>") == [0, "text", 1, "text", 2]
    refused = fault(lambda: parts("<image>and<image>"))
    assert refused.code == "marks_mismatch"


@pytest.mark.parametrize(
    ("name", "code", "sentence"),
    [
        ("report.pdf#page=6", "unreadable_document", "has pages 1 to 5, and page 6 is asked for"),
        ("report.pdf#page=0", "unreadable_document", "and page 0 is asked for"),
        ("report.pdf#page=4-2", "unreadable_document", "and pages 4 to 2 is asked for"),
        ("long.pdf", "unreadable_document", f"would be 101 pictures, and one entry may be {MAX_PAGES}; name the pages"),
        ("text.pdf", "unreadable_document", "cannot be read as PDF"),
        ("empty.pdf", "unreadable_document", "cannot be read as PDF"),
        ("cut.pdf", "unreadable_document", "print it to a new PDF, or save its pages as PNG"),
        ("locked.pdf", "unreadable_document", "is protected by a password; save a copy without one"),
        ("gone.pdf", "missing_file", "gone.pdf is missing"),
        ("../report.pdf", "outside_root", "set data.image_root"),
    ],
)
def test_unusable_documents_have_sentences(folder, name, code, sentence):
    (folder / "long.pdf").write_bytes(pdf(*[(72, 72)] * (MAX_PAGES + 1)))
    (folder / "text.pdf").write_text("no document")
    (folder / "empty.pdf").write_bytes(b"")
    (folder / "cut.pdf").write_bytes(pdf(A4)[:60])
    locked = "<< /Filter /Standard /V 1 /R 2 /Length 40 /P -4 /O <{0}> /U <{0}> >>".format("ab" * 32)
    (folder / "locked.pdf").write_bytes(pdf(A4, Encrypt=locked, ID=f"[<{'00' * 16}> <{'00' * 16}>]"))
    refused = fault(lambda: pages_of(folder, name))
    assert (refused.code, refused.where) == (code, "rows.jsonl:1")
    assert sentence in str(refused)


def test_page_of_a_hundred_million_pixels_is_a_bomb(tmp_path):
    (tmp_path / "huge.pdf").write_bytes(pdf((14_000, 14_000)))
    refused = fault(lambda: header_px(pages_of(tmp_path, "huge.pdf")[0]))
    assert refused.code == "decompression_bomb"
    assert "28,000 x 28,000 px at 144 dpi" in str(refused)


def test_page_that_takes_too_long_is_given_up(tmp_path):
    """Its picture claims 65,500 x 65,500 px in a file of 1.5 KB: ten seconds of a core, where a page takes hundredths."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, "PDF")
    start, frame, rest = buffer.getvalue().partition(b"\xff\xc0\0\x11\x08")  # JPEG's SOF0, then height and width
    assert frame
    (tmp_path / "slow.pdf").write_bytes(start + frame + (65_500).to_bytes(2) * 2 + rest[4:])
    started = time.monotonic()
    refused = fault(lambda: draw_page(pages_of(tmp_path, "slow.pdf")[0], limit_s=0.2))
    assert (refused.code, "takes over 0.2 s to draw; save the page as PNG" in str(refused)) == (
        "unreadable_document",
        True,
    )
    assert time.monotonic() - started < 5


def test_without_the_library_the_sentence_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdfium2", None)  # as where it is not installed
    (folder / "other.pdf").write_bytes(pdf(A4))
    refused = fault(lambda: pages_of(folder, "other.pdf"))
    assert (refused.code, "pip install 'lensmith[pdf]'" in str(refused)) == ("unreadable_document", True)


def test_changed_document_is_counted_again(folder):
    assert len(pages_of(folder, "report.pdf")) == 5
    (folder / "report.pdf").write_bytes(pdf(A4, A4))
    assert len(pages_of(folder, "report.pdf")) == 2


def test_only_documents_have_pages():
    assert split_pages("a.pdf") == ("a.pdf", (1, None))
    assert split_pages("a.PDF#page=2") == ("a.PDF", (2, 2))
    for name in ("a.png#page=2", "a.pdf#page=x", "a.pdf.png", "report#page=2", "a.pdf/b.png"):
        assert split_pages(name) == (name, None)


def test_scanned_page_comes_out_as_it_went_in(tmp_path):
    Image.new("RGB", (600, 400), (10, 200, 30)).save(tmp_path / "scan.pdf", resolution=PAGE_DPI)
    drawn = open_image(pages_of(tmp_path, "scan.pdf")[0])
    assert drawn.size == (600, 400)
    np.testing.assert_allclose(np.asarray(drawn)[200, 300], (10, 200, 30), atol=4)
