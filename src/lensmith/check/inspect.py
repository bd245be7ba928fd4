"""Rows read once, a chunk at a time: every fault and oddity of each, and the numbers that the report is made of.

This is the part of a check that worker processes do. Unlike training, which stops at a row's first fault, it goes on: all
pictures of a row are looked at, and all that is wrong with it is told. What comes back is a few dozen bytes per row.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lensmith.check.findings import CODES
from lensmith.check.keys import digest, row_keys
from lensmith.check.pictures import Look, look_at
from lensmith.check.texts import SCRIPTS, count_scripts, ends_in_loop, media_tokens
from lensmith.data.box_evidence import BoxTally, audit_boxes
from lensmith.data.measure import Chunk, Measurer
from lensmith.data.refs import NOT_THERE
from lensmith.errors import RowError
from lensmith.types import ImageRef, counted

if TYPE_CHECKING:
    from jaxtyping import Int

    from lensmith.check.findings import Code
    from lensmith.types import ImageSize, Sample

ROW_NUMBERS = {"rows": "q", "exact": "Q", "loose": "Q", "asked": "Q", "answered": "Q", "characters": "i"}
"""Of each usable row: its number, its keys (check/keys.py) and the length of its last answer. 44 bytes."""
PICTURE_NUMBERS = {
    "picture_rows": "q", "contents": "Q", "looks": "Q", "colours": "i",
    "heights": "i", "widths": "i", "seen_heights": "i", "seen_widths": "i",
}  # fmt: skip
"""Of each picture that such a row shows: the row, a digest of its bytes, its impression (colour NO_IMPRESSION where there
is none) and its sides on disk and as seen, in pixels. 44 bytes."""
NO_IMPRESSION = -1

Note = tuple["Code", str]
"""A code and its sentence."""

KNOWN_LOOKS = 16_384
"""Pictures remembered per process, so that questions about one picture decode it once; about 500 bytes each."""
NAMED_TOKENS = 3


@dataclass(frozen=True, slots=True)
class Fault:
    """Something to report about one row."""

    row: int
    code: Code
    where: str
    sentence: str
    refuses: bool
    """Whether the row cannot be used."""


def _arrays() -> dict[str, array[Any]]:
    return {name: array(code) for name, code in (ROW_NUMBERS | PICTURE_NUMBERS).items()}


@dataclass(slots=True)
class Part:
    """What was found in some consecutive rows."""

    num_rows: int
    chunk: Chunk = field(default_factory=Chunk)
    numbers: dict[str, array[Any]] = field(default_factory=_arrays)
    faults: list[Fault] = field(default_factory=list)
    """In order of rows; one per row and code."""
    refused: array[int] = field(default_factory=lambda: array("q"))
    """Row numbers."""
    formats: Counter[str] = field(default_factory=Counter)
    boxes: defaultdict[int, BoxTally] = field(default_factory=lambda: defaultdict(BoxTally))
    """By the number of the file."""
    scripts: Int[np.ndarray, " scripts"] = field(default_factory=lambda: np.zeros(len(SCRIPTS), np.int64))

    def add(self, **numbers: int) -> None:
        """Append one number to each of the named arrays."""
        for name, number in numbers.items():
            self.numbers[name].append(number)

    def report(self, row: int, where: str, refusals: Iterable[RowError], notes: Iterable[Note] = ()) -> None:
        """Add what was found in a row; of several findings with one code, the first stands for all."""
        found: dict[Code, Fault] = {}
        for refusal in refusals:
            found.setdefault(refusal.code, Fault(row, refusal.code, where, refusal.sentence, refuses=True))
        for code, sentence in notes:
            refuses = CODES[code].severity == "error"
            found.setdefault(code, Fault(row, code, where, sentence, refuses))
        if any(fault.refuses for fault in found.values()):
            self.refused.append(row)
        self.faults += found.values()


class Inspector:
    """Inspects rows of one source; each worker process has a copy."""

    def __init__(self, measurer: Measurer, *, decode: bool) -> None:
        """`decode`: whether every picture is decoded in full, or only its header and end mark read."""
        self.measurer, self.decode = measurer, decode
        self._looks: dict[str, Look] = {}

    def inspect(self, start: int, stop: int) -> Part:
        """Rows start .. stop - 1; nothing that is wrong with them is raised."""
        part, texts = Part(stop - start), list[str]()
        for row in range(start, stop):
            self._inspect_row(row, part, texts)
        part.scripts = count_scripts("".join(texts))
        return part

    def _inspect_row(self, row: int, part: Part, texts: list[str]) -> None:
        refusals: list[RowError] = []
        try:
            sample = self.measurer.source.samples.read(row, refusals)
        except RowError as fault:
            part.report(row, fault.where, [*refusals, fault])
            return
        looks = {ref: self.look(ref) for ref in sample.images if ref != NOT_THERE}
        refusals += [look.fault.at(sample.where) for look in looks.values() if look.fault is not None]
        notes = [*_odd_pictures(looks), *odd_texts(sample)]
        if not refusals:
            try:
                notes += self._measure(row, sample, looks, part)
            except RowError as fault:
                refusals.append(fault)
            else:
                texts += [message.text for message in sample.messages]
        part.report(row, sample.where, refusals, notes)

    def look(self, ref: ImageRef) -> Look:
        """What is known of a picture, from the row before or from its file."""
        look = self._looks.get(ref.key)
        if look is None:
            look = look_at(ref, self.measurer.source, decode=self.decode)
            if len(self._looks) >= KNOWN_LOOKS:
                del self._looks[next(iter(self._looks))]
            self._looks[ref.key] = look
        return look

    def _measure(self, row: int, sample: Sample, looks: Mapping[ImageRef, Look], part: Part) -> list[Note]:
        """Add the numbers of a row with nothing wrong so far; returns what there is to say about its boxes and length.

        Raises:
            RowError: the row does not fit the token budget, or the template does not take it.
        """
        fitted = self.measurer.fit(row, sample)
        boxes = audit_boxes(sample, (fitted.encoded or fitted.original).images, sample.boxes)
        if boxes.boxes or boxes.points:
            part.boxes[self.measurer.source.samples.place(row)[0]] += BoxTally.of([boxes])
        if boxes.faults:
            return [*boxes.faults]
        self.measurer.add(row, sample, fitted, part.chunk)
        if fitted.encoded is None:
            return [("too_long", f"{self.measurer.excess(fitted.original)} It is left out, as data.on_long=drop says.")]
        videos = [digest(video.key.encode("utf-8", "surrogatepass")) for video in sample.videos]
        keys = row_keys(sample, [*(looks[ref].content for ref in sample.images), *videos])
        part.add(rows=row, characters=len(sample.answer), **keys._asdict())
        for image in fitted.encoded.images:
            _add_picture(row, image, looks.get(image.ref) if isinstance(image.ref, ImageRef) else None, part)
        if fitted.cap is None:
            return []
        reduced = f"Its images are reduced until it has {fitted.encoded.num_tokens:,}, as data.on_long=shrink says."
        return [("too_long", f"{self.measurer.excess(fitted.original)} {reduced}")]


def _add_picture(row: int, image: ImageSize, look: Look | None, part: Part) -> None:
    """Add the numbers of one picture of a row; of frames of a video, which have no look, only the sizes."""
    bits, colour = (look and look.impression) or (0, NO_IMPRESSION)
    (height, width), (seen_height, seen_width) = image.original_px, image.seen_px
    content = look.content if look else digest(image.ref.key.encode("utf-8", "surrogatepass"))
    part.add(picture_rows=row, contents=content, looks=bits, colours=colour)
    part.add(heights=height, widths=width, seen_heights=seen_height, seen_widths=seen_width)
    part.formats[look.header.format if look and look.header else "video"] += 1


def _odd_pictures(looks: Mapping[ImageRef, Look]) -> Iterator[Note]:
    for ref, look in looks.items():
        for code, sentence in look.oddities:
            yield code, f"{ref} {sentence}"


def odd_texts(sample: Sample) -> Iterator[Note]:
    """What is odd about the texts of a sample, with a sentence each."""
    for number, message in enumerate(sample.messages, 1):
        text = message.text
        if tokens := media_tokens(text):
            named = ", ".join(map(repr, list(dict.fromkeys(tokens))[:NAMED_TOKENS]))
            yield (
                "media_token_in_text",
                f"turn {number} ({message.role}) holds {named} as text ({counted(len(tokens), 'time')}).",
            )
        if message.role == "assistant" and (piece := ends_in_loop(text)):
            yield (
                "endless_answer",
                f"the answer in turn {number} ({len(text):,} characters) ends in a loop of {piece!r}.",
            )
