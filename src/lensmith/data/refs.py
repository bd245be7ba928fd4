# ruff: noqa: PTH110, PTH113, PTH118  (pathlib takes five times as long, and this runs for every picture of every row)
"""What a cell may hold as a picture, turned into ImageRefs; nothing is opened, files are only looked for.

A path, a data URI, base64, an http(s) address, encoded bytes, a {"bytes", "path"} struct as Hugging Face data sets store
pictures, a PIL image, a {"url"} struct as chat APIs write them; or a list of these, also written as JSON or with `;`.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from PIL import Image

from lensmith.errors import RowError
from lensmith.types import ImageRef

BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0A")
"""How JPEG, PNG, GIF, WebP, BMP and the two TIFFs begin in base64."""
SHORTEST_BASE64 = 64
"""No picture is smaller; shorter text is a path."""

NOT_THERE = ImageRef(b"", "")
"""Stands for a picture that cannot be had, where faults are collected instead of raised."""


@dataclass(frozen=True, slots=True)
class RefReader:
    """Turns the cells of one data file into ImageRefs."""

    root: str
    """Absolute folder that relative paths start from. A string, because this is asked for every row."""
    allow_urls: bool = False
    faults: list[RowError] | None = None
    """Collects what is wrong with single pictures, which NOT_THERE then stands for; None raises it."""

    def read(self, cell: Any, where: str) -> list[ImageRef]:
        """All pictures in a cell; none for null or an empty string.

        Raises:
            RowError: `missing_file`, `url_not_allowed`, or `unreadable_image` for what cannot be a picture.
        """
        return [self._read_or_note(value, where) for value in self._flatten(cell)]

    def _read_or_note(self, value: Any, where: str) -> ImageRef:
        try:
            return self._read_one(value, where)
        except RowError as fault:
            if self.faults is None:
                raise
            self.faults.append(fault)
            return NOT_THERE

    def _flatten(self, cell: Any) -> Iterator[Any]:
        if cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell)):
            return
        if isinstance(cell, Mapping):
            cell = _payload(cell)
            if cell is not None:
                yield from self._flatten(cell)
        elif isinstance(cell, str):
            yield from self._split(cell.strip())
        elif isinstance(cell, Iterable) and not isinstance(cell, (bytes, bytearray, Image.Image)):
            for value in cell:
                yield from self._flatten(value)
        else:
            yield cell

    def _split(self, cell: str) -> Iterator[Any]:
        if cell.startswith("["):
            try:
                listed = json.loads(cell)
            except json.JSONDecodeError:
                yield cell  # a file may be called [1].png
                return
            yield from self._flatten(listed)
        elif ";" in cell and not _has_scheme(cell) and not os.path.exists(self._path(cell)):
            yield from (part.strip() for part in cell.split(";") if part.strip())
        elif cell:
            yield cell

    def _read_one(self, value: Any, where: str) -> ImageRef:
        if isinstance(value, (bytes, bytearray)):
            return _from_bytes(bytes(value))
        if isinstance(value, Image.Image):
            return _from_bytes(_encode(value))
        if isinstance(value, (str, Path)):
            return self._from_text(str(value), where)
        raise RowError(
            where,
            "unreadable_image",
            f"a value of type {type(value).__name__} stands where a picture should; give a path, bytes or base64.",
        )

    def _from_text(self, value: str, where: str) -> ImageRef:
        if value.startswith("data:"):
            return _from_bytes(_decode(value.partition(",")[2], where))
        if value.startswith(("http://", "https://")):
            if self.allow_urls:
                return ImageRef(value, value)
            raise RowError(
                where,
                "url_not_allowed",
                f"{value} is an address, and data.allow_urls is false; download the picture and name the file, "
                "or set data.allow_urls=true.",
            )
        if len(value) >= SHORTEST_BASE64 and value.startswith(BASE64_STARTS) and "." not in value:
            return _from_bytes(_decode(value, where))
        return self._from_path(value.removeprefix("file://"), where)

    def _path(self, name: str) -> str:
        # normpath, not resolve(): a few microseconds instead of a look at every folder on the way.
        return os.path.normpath(os.path.join(self.root, name))

    def _from_path(self, name: str, where: str) -> ImageRef:
        key = self._path(name)
        path = Path(key)
        if not os.path.isfile(key):
            if path.is_dir():
                what = "is a folder"
            else:
                what = "is missing" if path.parent.is_dir() else f"is missing, and so is its folder {path.parent}"
            raise RowError(
                where,
                "missing_file",
                f"{path} {what}; relative paths start from {self.root}, which data.image_root changes. "
                "To leave such rows out, set data.on_bad_row=skip.",
            )
        return ImageRef(path, key)


def _payload(struct: Mapping[str, Any]) -> Any:
    """The picture inside a struct; bytes come first, since the path beside them may be of another machine."""
    for key in ("bytes", "path", "url", "image", "image_url", "base64"):
        if struct.get(key) is not None:
            return struct[key]
    return None


def _has_scheme(cell: str) -> bool:
    return cell.startswith(("data:", "http://", "https://"))


def _decode(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as cause:
        raise RowError(
            where, "unreadable_image", f"a picture's base64 is broken ({cause}); encode it again."
        ) from cause


def _from_bytes(content: bytes) -> ImageRef:
    return ImageRef(content, blake2b(content, digest_size=16).hexdigest())


def _encode(image: Image.Image) -> bytes:
    """A picture held in memory as a lossless file; PNG has no CMYK or float greys, TIFF has."""
    buffer = io.BytesIO()
    if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        image.save(buffer, "PNG", compress_level=1)
    else:
        image.save(buffer, "TIFF")
    return buffer.getvalue()
