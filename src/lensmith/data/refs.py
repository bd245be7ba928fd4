"""What a cell may hold as a picture, turned into ImageRefs; files are only looked for, except to count a document's pages.

A path, a data URI, base64, an address, encoded bytes, a {"bytes", "path"} struct as Hugging Face data sets store pictures,
a PIL image, a {"url"} struct as chat APIs write them; or a list of these, also written as JSON or with `;`. A path may be
that of a document, with or without pages: report.pdf, report.pdf#page=3, report.pdf#page=2-5.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from PIL import Image

from lensmith.data.documents import ALL_PAGES, DOCUMENT_START, read_pages, split_pages
from lensmith.data.json_text import NotJson, parse_json
from lensmith.data.places import WEB, LocalRoot
from lensmith.data.remote import RemoteRoot, is_remote, outside
from lensmith.errors import RowError
from lensmith.types import ImageRef

BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0A")
"""How JPEG, PNG, GIF, WebP, BMP and the two TIFFs begin in base64."""
SHORTEST_BASE64 = 64
"""No picture is smaller; shorter text is a path."""

DEEPEST_CELL = 8
"""A list in a struct in a JSON text is three deep."""
SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://")

NOT_THERE = ImageRef(b"", "")
"""Stands for a picture that cannot be had, where faults are collected instead of raised."""


Pictures = tuple[ImageRef, ...]
"""What one entry of a cell names: one picture, or the pages of a document."""


class RefReader:
    """Turns the cells of one data file into ImageRefs."""

    def __init__(self, root: str | Path, *, allow_urls: bool = False, allow_outside: bool = False) -> None:
        """`root`: the folder that relative paths start from, on this machine or at an address.

        Raises:
            DataError: the library for addresses like the root's is not installed.
        """
        self.allow_urls, self.allow_outside = allow_urls, allow_outside
        at_address = is_remote(str(root))
        self._root = (RemoteRoot if at_address else LocalRoot)(str(root), allow_outside=allow_outside)

    def read(self, cell: Any, where: str, faults: list[RowError] | None = None) -> list[Pictures]:
        """All pictures in a cell, entry by entry; none for null or an empty string.

        Args:
            faults: collects what is wrong with single pictures, which NOT_THERE then stands for; None raises it.

        Raises:
            RowError: `missing_file`, `outside_root`, `url_not_allowed`, `unreadable_document`, or `unreadable_image` for
                what cannot be a picture.
        """
        return [self._read_or_note(value, where, faults) for value in self._flatten(cell, where)]

    def _read_or_note(self, value: Any, where: str, faults: list[RowError] | None) -> Pictures:
        try:
            return self._read_one(value, where)
        except RowError as fault:
            if faults is None:
                raise
            faults.append(fault)
            return (NOT_THERE,)

    def _flatten(self, cell: Any, where: str, depth: int = 0) -> Iterator[Any]:
        if depth > DEEPEST_CELL:
            raise RowError(
                where, "malformed_row", f"pictures stand in lists nested over {DEEPEST_CELL} deep; flatten them."
            )
        if cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell)):
            return
        if isinstance(cell, Mapping):
            cell = _payload(cell)
            if cell is not None:
                yield from self._flatten(cell, where, depth + 1)
        elif isinstance(cell, str):
            yield from self._split(cell.strip(), where, depth)
        elif isinstance(cell, Iterable) and not isinstance(cell, (bytes, bytearray, Image.Image)):
            for value in cell:
                yield from self._flatten(value, where, depth + 1)
        else:
            yield cell

    def _split(self, cell: str, where: str, depth: int) -> Iterator[Any]:
        if cell.startswith("["):
            try:
                listed = parse_json(cell)
            except NotJson:
                yield cell  # a file may be called [1].png
                return
            yield from self._flatten(listed, where, depth + 1)
        elif ";" in cell and not _has_scheme(cell) and not self._is_file(cell):
            yield from (part.strip() for part in cell.split(";") if part.strip())
        elif cell:
            yield cell

    def _is_file(self, cell: str) -> bool:
        return isinstance(self._root, LocalRoot) and self._root.holds(cell)

    def _read_one(self, value: Any, where: str) -> Pictures:
        if isinstance(value, (bytes, bytearray)):
            return _from_bytes(bytes(value), where)
        if isinstance(value, Image.Image):
            return _from_bytes(encode_picture(value), where)
        if isinstance(value, (str, Path)):
            return self._from_text(str(value), where)
        raise RowError(
            where,
            "unreadable_image",
            f"a value of type {type(value).__name__} stands where a picture should; give a path, bytes or base64.",
        )

    def _from_text(self, value: str, where: str) -> Pictures:
        if value.startswith("data:"):
            return _from_bytes(_decode(value.partition(",")[2], where), where)
        if len(value) >= SHORTEST_BASE64 and value.startswith(BASE64_STARTS) and "." not in value:
            return _from_bytes(_decode(value, where), where)
        name, pages = split_pages(value)
        ref = self._from_name(name, where)
        return (ref,) if pages is None else read_pages(ref, pages, where)

    def _from_name(self, name: str, where: str) -> ImageRef:
        if name.startswith(WEB):
            self._allow_web(name, where)
            return ImageRef(name, name)
        if name.startswith("file://"):
            name = unquote(name.removeprefix("file://"))
        if isinstance(self._root, RemoteRoot):
            address = self._root.join(name, where)
            return ImageRef(address, address)
        if is_remote(name):
            if not self.allow_outside:
                raise outside(name, self._root.folder, where)
            return ImageRef(name, name)
        path, member = self._root.find(name, where)
        return ImageRef(Path(path), path if member is None else f"{path}/{member}", member)

    def _allow_web(self, address: str, where: str) -> None:
        if not self.allow_urls:
            raise RowError(
                where,
                "url_not_allowed",
                f"{address} is an address, and data.allow_urls is false; download the picture and name the file, "
                "or set data.allow_urls=true.",
            )


def _payload(struct: Mapping[str, Any]) -> Any:
    """The picture inside a struct; bytes come first, since the path beside them may be of another machine."""
    for key in ("bytes", "path", "url", "image", "image_url", "base64"):
        if struct.get(key) is not None:
            return struct[key]
    return None


def _has_scheme(cell: str) -> bool:
    return cell.startswith("data:") or SCHEME.match(cell) is not None


def _decode(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as cause:
        raise RowError(
            where, "unreadable_image", f"a picture's base64 is broken ({cause}); encode it again."
        ) from cause


def _from_bytes(content: bytes, where: str) -> Pictures:
    ref = ImageRef(content, blake2b(content, digest_size=16).hexdigest())
    return read_pages(ref, ALL_PAGES, where) if content.startswith(DOCUMENT_START) else (ref,)


def encode_picture(image: Image.Image) -> bytes:
    """A picture held in memory as a lossless file; PNG has no CMYK or float greys, TIFF has."""
    buffer = io.BytesIO()
    if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        image.save(buffer, "PNG", compress_level=1)
    else:
        image.save(buffer, "TIFF")
    return buffer.getvalue()
