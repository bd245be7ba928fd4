"""COCO's JSON as arrays: read element by element, so that segmentations of any size are never all in memory.

While a file is read, its text is in memory once (1.2 times its size measured with the arrays; where it holds characters
beyond ASCII, Python needs two to three times its size). What stays is 44 bytes per annotation, and per picture its name and
about 30 bytes. Nothing of an element is trusted: what is not as it should be is a fault of that annotation.
"""

from __future__ import annotations

import json
import mmap
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lensmith.data.box_text import is_coordinate
from lensmith.errors import DataError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

HEAD_BYTES = 4096
START = re.compile(rb'(?:\xef\xbb\xbf)?\s*\{\s*"(?:info|licenses|images|annotations|categories|type)"\s*:\s*["\[{]')
"""How a COCO file begins; some rows of JSON Lines do too."""
BLACK = re.compile(rb"\S")
GAP = re.compile(r"[\s,:]*")
NO_NUMBER = -(2**63)
"""Stands for an id that is missing or no whole number."""


@dataclass(frozen=True, slots=True)
class Annotation:
    """One box of a picture."""

    id: int
    label: str
    box: tuple[float, ...]
    """x, y, width, height in pixels."""
    fault: str
    """Why it cannot be used; empty where it can."""


class Coco:
    """The pictures of a COCO file in its order, each with its annotations in theirs."""

    def __init__(self, path: Path, builder: _Builder) -> None:
        """Raises DataError where annotations cannot be told to belong to one picture."""
        self.names = builder.names
        self.image_ids = np.array(builder.image_ids, np.int64)
        self._sizes_px = np.array(builder.sizes_px, np.int32).reshape(-1, 2)
        self.labels = list(builder.categories.values())
        numbers = {number: index for index, number in enumerate(builder.categories)}
        images = _by_id(path, builder)
        owners = np.array([images.get(number, -1) for number in builder.owners], np.int64)
        order = np.argsort(owners, kind="stable")[int((owners < 0).sum()) :]
        self._ids: Int[np.ndarray, " annotations"] = np.array(builder.ids, np.int64)[order]
        self._boxes: Float[np.ndarray, "annotations 4"] = np.array(builder.boxes, np.float64).reshape(-1, 4)[order]
        self._labels = np.array([numbers.get(number, -1) for number in builder.kinds], np.int32)[order]
        self._stops = np.searchsorted(owners[order], np.arange(len(self.names)), side="right")
        self.crowds, self.segmentations = builder.crowds, builder.segmentations
        self.strays = len(owners) - len(order)
        """Annotations of pictures that the file does not list."""
        if self.strays and not len(order):
            raise DataError(
                f"{path}: none of the {self.strays:,} annotations has an image_id that is among the images, such as "
                f"{builder.image_ids[0]}; is this the file that belongs to them?"
            )

    @property
    def num_annotations(self) -> int:
        """All in the file, strays included."""
        return len(self._ids) + self.strays

    @property
    def empty(self) -> int:
        """Pictures without annotations."""
        return int((np.diff(self._stops, prepend=0) == 0).sum())

    def size_px(self, index: int) -> tuple[int, int] | None:
        """Height and width that the file gives for a picture, which its boxes refer to."""
        height, width = self._sizes_px[index].tolist()
        return (height, width) if height > 0 < width else None

    def annotations(self, index: int) -> Iterator[Annotation]:
        """Those of one picture."""
        start = int(self._stops[index - 1]) if index else 0
        for place in range(start, int(self._stops[index])):
            kind, box = int(self._labels[place]), tuple(self._boxes[place].tolist())
            fault = "is of a category that the file does not list" if kind < 0 else ""
            if not np.isfinite(box).all():
                fault = "has no bbox of four numbers"
            yield Annotation(int(self._ids[place]), self.labels[kind] if kind >= 0 else "", box, fault)


class _Builder:
    """Collects what is kept of each element."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.image_ids, self.sizes_px = array("q"), array("i")
        self.ids, self.owners, self.kinds, self.boxes = array("q"), array("q"), array("q"), array("d")
        self.categories: dict[int, str] = {}
        self.crowds, self.segmentations = 0, False

    def add(self, section: str, element: Any) -> None:
        """Keep one element of one of the three lists."""
        if element is None:
            return
        entry = element if isinstance(element, dict) else {}
        number = _whole(entry.get("id"))
        if section == "images":
            name = entry.get("file_name")
            self.names.append(name if isinstance(name, str) else "")
            self.image_ids.append(number)
            self.sizes_px.extend(_side(entry.get(side)) for side in ("height", "width"))
        elif section == "categories":
            if number != NO_NUMBER:  # else its annotations say that they have none
                self.categories[number] = str(entry.get("name", number))
        elif section == "annotations":
            self.ids.append(number if number != NO_NUMBER else len(self.ids))
            self.owners.append(_whole(entry.get("image_id")))
            self.kinds.append(_whole(entry.get("category_id")))
            self.boxes.extend(_box(entry.get("bbox")))
            self.crowds += entry.get("iscrowd") == 1
            self.segmentations = self.segmentations or bool(entry.get("segmentation"))


def _by_id(path: Path, builder: _Builder) -> dict[int, int]:
    """Number of each picture by its id."""
    images: dict[int, int] = {}
    for index, (number, name) in enumerate(zip(builder.image_ids, builder.names, strict=True)):
        if number == NO_NUMBER:
            raise DataError(f"{path}: image {index} of the list ({name}) has no whole number as its id; give it one")
        if number in images:
            raise DataError(
                f"{path}: two images have the id {number}, {builder.names[images[number]]} and {name}, so that their "
                "annotations cannot be told apart; number them anew"
            )
        images[number] = index
    return images


def read_coco(path: Path) -> Coco | None:
    """The annotations of a COCO file; None where the file is something else.

    Raises:
        DataError: it begins like one but is damaged, lists no pictures, or leaves open which annotations are theirs.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if not START.match(content[:HEAD_BYTES]) or is_lines(content):
            return None
        builder, found = _Builder(), set()
        try:
            for section, element in _elements(str(content, "utf-8")):
                found.add(section)
                builder.add(section, element)
        except (ValueError, RecursionError) as cause:
            raise DataError(
                f"{path}: begins like COCO annotations but is not whole JSON ({cause}). It was probably cut off: write it "
                "again."
            ) from cause
    if not {"images", "annotations"} <= found:
        return None
    if not builder.names:
        raise DataError(f'{path}: COCO annotations with 0 entries under "images"; is this the right file?')
    return Coco(path, builder)


def is_lines(content: mmap.mmap) -> bool:
    """Whether the first line ends an object and more follow, as in JSON Lines."""
    end = content.find(b"\n")
    return content[max(0, end - 2) : end].rstrip().endswith(b"}") and BLACK.search(content, end) is not None


def _elements(text: str) -> Iterator[tuple[str, Any]]:
    """The elements of each list in the first object, with its key; None comes first, so that empty lists are known of too.

    Raises:
        ValueError: it is not JSON.
    """
    decode = json.JSONDecoder().raw_decode
    place = _after_gap(text, text.index("{") + 1)
    while place < len(text) and text[place] != "}":
        key, place = decode(text, place)
        if not isinstance(key, str):
            raise json.JSONDecodeError("Expecting property name", text, place)
        place = _after_gap(text, place)
        if text[place : place + 1] != "[":
            _, place = decode(text, place)
        else:
            yield key, None
            place = _after_gap(text, place + 1)
            while text[place : place + 1] != "]":
                element, place = decode(text, place)
                yield key, element
                place = _after_gap(text, place)
            place += 1
        place = _after_gap(text, place)
    if place >= len(text):
        raise json.JSONDecodeError("Expecting '}'", text, place)


def _after_gap(text: str, place: int) -> int:
    match = GAP.match(text, place)
    return match.end() if match else place


def _whole(value: Any) -> int:
    return value if type(value) is int and abs(value) < 2**63 else NO_NUMBER


def _side(value: Any) -> int:
    return value if type(value) is int and 0 < value < 2**31 else 0


def _box(value: Any) -> tuple[float, ...]:
    is_box = isinstance(value, list) and len(value) == 4 and all(map(is_coordinate, value))
    return tuple(map(float, value)) if is_box else (float("nan"),) * 4
