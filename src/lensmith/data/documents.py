"""Documents: every page of a PDF as one picture, drawn by PDFium.

A page has a size in points and no pixels of its own. Here it is a picture of PAGE_DPI, known without drawing anything,
and from then on like any other: it costs what its size says, at most data.image.max_tokens. An A4 page is 1,191 x 1,684
px, which is 1,961 tokens; the default of 1,280 shows it at 116 dpi.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from lensmith.data.places import open_ref
from lensmith.errors import RowError
from lensmith.types import ImageRef

if TYPE_CHECKING:
    from pypdfium2 import PdfDocument, PdfPage

PAGE_DPI = 144
"""Twice the points of PDF, so that sizes are whole for whole points; ten-point type is 20 px high."""
SCALE = PAGE_DPI // 72
MAX_PAGES = 100
"""Most pages that one entry of a row may stand for."""
MAX_DRAW_S = 20.0
"""Time to draw one page; a dense one takes a second."""
MAX_DOCUMENT_PAGES = 10_000
"""Longer documents are refused: a file of a few bytes can claim any number."""
KNOWN_DOCUMENTS = 1024
"""Documents whose page sizes are remembered per process."""
DOCUMENT_START = b"%PDF-"
DOCUMENT = re.compile(
    r"(?P<name>.*\.pdf)(?:#page=(?P<first>\d{1,9})(?:-(?P<last>\d{1,9}))?)?", re.IGNORECASE | re.DOTALL
)

Pages = tuple[int, int | None]
"""First and last page, from 1; None stands for the end."""
ALL_PAGES: Pages = (1, None)


def split_pages(name: str) -> tuple[str, Pages | None]:
    """The name of a file, and which of its pages are meant; None for what is no document."""
    if ".pdf" not in name[-30:].lower() or not (match := DOCUMENT.fullmatch(name)):
        return name, None
    if match["first"] is None:
        return match["name"], ALL_PAGES
    return match["name"], (int(match["first"]), int(match["last"] or match["first"]))


def read_pages(document: ImageRef, pages: Pages, where: str) -> tuple[ImageRef, ...]:
    """Those pages, each as a picture; the document is opened to count them.

    Raises:
        RowError: `unreadable_document`, also for pages that it does not have, and for more than MAX_PAGES.
    """
    try:
        count = len(_sizes(document))
    except FileNotFoundError as cause:
        raise RowError(where, "missing_file", f"{document} is gone.") from cause
    except RowError as fault:
        raise fault.at(where) from fault
    first, last = pages[0], count if pages[1] is None else pages[1]
    if not 1 <= first <= last <= count:
        asked = f"page {first}" if first == last else f"pages {first} to {last}"
        sentence = f"{document} has pages 1 to {count}, and {asked} is asked for; mend what follows #page=."
        raise RowError(where, "unreadable_document", sentence)
    if last - first >= MAX_PAGES:
        raise RowError(
            where,
            "unreadable_document",
            f"{document} would be {last - first + 1:,} pictures, and one entry may be {MAX_PAGES}; "
            f"name the pages to read, as in #page=1-{MAX_PAGES}.",
        )
    numbers = range(first, last + 1)
    return tuple(replace(document, key=f"{document.key}#page={number}", page=number) for number in numbers)


def page_px(ref: ImageRef) -> tuple[int, int]:
    """Height and width of a page, upright; nothing is drawn.

    Raises:
        RowError: `unreadable_document`, or `decompression_bomb` for a page of more pixels than Pillow takes.
        FileNotFoundError: the file is gone.
    """
    sizes = _sizes(replace(ref, page=None))
    if not ref.page or ref.page > len(sizes):
        raise RowError(str(ref), "unreadable_document", f"the document has {len(sizes)} pages now; was it changed?")
    height, width = sizes[ref.page - 1]
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and height * width > most:
        sentence = f"the page is {width:,} x {height:,} px at {PAGE_DPI} dpi, over Pillow's limit; print it smaller."
        raise RowError(str(ref), "decompression_bomb", sentence)
    return height, width


def draw_page(ref: ImageRef, *, limit_s: float = MAX_DRAW_S) -> Image.Image:
    """The page in RGB on white, with its annotations and filled forms; as large as `page_px` says.

    Raises:
        RowError: `unreadable_document`, also for a page that takes over `limit_s`; `decompression_bomb`.
        FileNotFoundError: the file is gone.
    """
    height, width = page_px(ref)
    with _opened(ref) as document:
        from pypdfium2 import PdfiumError

        try:
            document.init_forms()
            return _draw(document[(ref.page or 1) - 1], width, height, limit_s)
        except TimeoutError as cause:
            sentence = f"takes over {limit_s:g} s to draw; save the page as PNG, or name the other pages."
            raise RowError(str(ref), "unreadable_document", sentence) from cause
        except PdfiumError as cause:
            raise _broken(ref, cause) from cause


def _draw(page: PdfPage, width: int, height: int, limit_s: float) -> Image.Image:
    """What PdfPage.render does, and stops in time: a few bytes of PDF can ask for minutes of work."""
    import pypdfium2.raw as pdfium
    from pypdfium2 import PdfBitmap, PdfiumError

    deadline = time.monotonic() + limit_s
    pause = pdfium.IFSDK_PAUSE(version=1)
    pause.NeedToPauseNow = type(pause.NeedToPauseNow)(lambda _: time.monotonic() > deadline)
    bitmap = PdfBitmap.new_native(width, height, pdfium.FPDFBitmap_BGR)
    bitmap.fill_rect((255, 255, 255, 255), 0, 0, width, height)
    how = (bitmap, page, 0, 0, width, height, 0, pdfium.FPDF_ANNOT)
    status = pdfium.FPDF_RenderPageBitmap_Start(*how, pause)
    pdfium.FPDF_RenderPage_Close(page)
    if status == pdfium.FPDF_RENDER_TOBECONTINUED:
        raise TimeoutError
    if status != pdfium.FPDF_RENDER_DONE:
        raise PdfiumError("a page cannot be drawn")
    if page.formenv:
        pdfium.FPDF_FFLDraw(page.formenv, *how)
    return bitmap.to_pil().convert("RGB")


def _sizes(document: ImageRef) -> tuple[tuple[int, int], ...]:
    """Height and width of every page in pixels; opened once as long as the file does not change."""
    is_file = isinstance(document.source, Path)
    changed_ns = os.stat(document.source).st_mtime_ns if is_file else None  # noqa: PTH116
    known = _known_sizes.get((document.key, changed_ns))
    if known is None:
        if len(_known_sizes) >= KNOWN_DOCUMENTS:
            _known_sizes.clear()
        known = _known_sizes[document.key, changed_ns] = tuple(_measure_pages(document))
    return known


_known_sizes: dict[tuple[str, int | None], tuple[tuple[int, int], ...]] = {}


def _measure_pages(document: ImageRef) -> Iterator[tuple[int, int]]:
    with _opened(document) as opened:
        from pypdfium2 import PdfiumError

        count = len(opened)
        if count > MAX_DOCUMENT_PAGES:
            sentence = f"has {count:,} pages, and a document may have {MAX_DOCUMENT_PAGES:,}; split it."
            raise RowError(str(document), "unreadable_document", sentence)
        for index in range(count):
            try:
                width, height = opened.get_page_size(index)
            except PdfiumError as cause:
                raise _broken(document, cause) from cause
            if not (0 < width < math.inf and 0 < height < math.inf):
                raise _broken(document, f"page {index + 1} is {width:g} x {height:g} points large")
            yield math.ceil(height * SCALE), math.ceil(width * SCALE)


@contextmanager
def _opened(ref: ImageRef) -> Iterator[PdfDocument]:
    try:
        from pypdfium2 import PdfDocument, PdfiumError
    except ImportError as cause:
        raise RowError(
            str(ref),
            "unreadable_document",
            "reading PDF needs pypdfium2, which is not installed; pip install 'lensmith[pdf]', or save the pages as PNG.",
        ) from cause
    is_file = isinstance(ref.source, Path) and ref.member is None
    source: Any = ref.source if is_file else open_ref(ref).read()
    try:
        document = PdfDocument(source)
    except PdfiumError as cause:
        raise _broken(ref, cause) from cause
    try:
        yield document
    finally:
        document.close()


def _broken(ref: ImageRef, cause: object) -> RowError:
    if "password" in str(cause).lower():
        return RowError(str(ref), "unreadable_document", "is protected by a password; save a copy without one.")
    sentence = f"cannot be read as PDF ({cause}); print it to a new PDF, or save its pages as PNG."
    return RowError(str(ref), "unreadable_document", sentence)
