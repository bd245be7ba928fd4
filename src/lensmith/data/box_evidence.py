"""What the numbers of boxes prove about their convention, row by row and over a file; never a guess without saying so.

Each row is read in every convention, and those that all of its boxes and points fit are its evidence:

    [1200, 40, 1500, 90] in 2,000 x 1,000 px        not 0 to 1000: over 1000
    [600, 40, 900, 90] in 640 x 480 px              not pixels: right of the picture
    [0.2, 0.2, 0.4, 0.5]                            shares: all at most 1, with fractions
    [500, 400, 100, 50]                             not corners: the second lies left of the first; x, y, width, height fit
    [100, 40, 300, 90] in 640 x 480 px              0 to 1000, corners in pixels or COCO's: proves nothing, and is counted so
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lensmith.data.box_text import BoxSpan, find_boxes, read_image_index
from lensmith.data.boxes import (
    IN_WORDS,
    NO_SIDES,
    SLACK,
    SidesPx,
    annotated_px,
    corners_of,
    count_videos_once,
    marking_texts,
    reference_px,
    scale_of,
)
from lensmith.types import counted

if TYPE_CHECKING:
    from lensmith.config.tree import BoxConvention, Boxes
    from lensmith.types import ImageSize, Sample

BoxCode = Literal["box_out_of_range", "box_inverted", "box_convention"]
Fault = tuple[BoxCode, str]
"""Code and sentence."""

READINGS: tuple[BoxConvention, ...] = ("xyxy_1000", "xyxy_px", "xywh_px", "xyxy_unit", "cxcywh_unit")
"""Conventions that numbers are read in; `resized_px` cannot be told from pixels, so it has to be declared."""
SHARES: tuple[BoxConvention, ...] = ("xyxy_unit", "cxcywh_unit")


@dataclass(frozen=True, slots=True)
class BoxNotes:
    """What was seen of the boxes of one row."""

    boxes: int = 0
    points: int = 0
    faults: tuple[Fault, ...] = ()
    """At most one, the first that applies."""
    evidence: frozenset[BoxConvention] = frozenset()
    """Conventions that all boxes and points of the row fit; the others are excluded."""


@dataclass(frozen=True, slots=True)
class BoxTally:
    """The notes of many rows, summed; adds up over workers."""

    boxes: int = 0
    points: int = 0
    faulty: int = 0
    """Rows with a fault."""
    rows: Mapping[frozenset[BoxConvention], int] = field(default_factory=dict)
    """Evidence -> rows with boxes or points that have it; a few dozen entries, however many rows."""

    @classmethod
    def of(cls, notes: Iterable[BoxNotes]) -> BoxTally:
        """The sum of the notes of some rows."""
        boxes = points = faulty = 0
        rows: Counter[frozenset[BoxConvention]] = Counter()
        for note in notes:
            boxes, points, faulty = boxes + note.boxes, points + note.points, faulty + bool(note.faults)
            if note.boxes or note.points:
                rows[note.evidence] += 1
        return cls(boxes, points, faulty, dict(rows))

    def __add__(self, other: BoxTally) -> BoxTally:
        rows = dict(Counter(self.rows) + Counter(other.rows))
        return BoxTally(self.boxes + other.boxes, self.points + other.points, self.faulty + other.faulty, rows)

    @property
    def num_rows(self) -> int:
        """Rows with boxes or points."""
        return sum(self.rows.values())

    def fitting(self, convention: BoxConvention) -> int:
        """Rows that fit the convention."""
        return sum(count for evidence, count in self.rows.items() if convention in evidence)


@dataclass(frozen=True, slots=True)
class _Mark:
    """One box or point, with the pictures that it may belong to."""

    span: BoxSpan
    written: str
    """Its kind and numbers, for sentences."""
    pictures: tuple[tuple[SidesPx, SidesPx], ...]
    """Of each, the height and width that pixels refer to, and those after resizing; never empty."""

    def fault(self, convention: BoxConvention) -> BoxCode | None:
        """What is wrong with it in this convention; None where it fits one of its pictures."""
        fault = None
        for picture in self.pictures:
            fault = self._fault_in(convention, *picture)
            if fault is None:
                return None
        return fault

    def fits(self, readings: Sequence[BoxConvention]) -> tuple[BoxConvention, ...]:
        """Those of the conventions that it fits."""
        return tuple(name for name in readings if self.fault(name) is None)

    def _fault_in(self, convention: BoxConvention, size_px: SidesPx, seen_px: SidesPx) -> BoxCode | None:
        corners = corners_of(self.span.numbers, convention)
        scale, slack = scale_of(convention, size_px=size_px, seen_px=seen_px), SLACK[convention]
        if any(not -slack <= number <= scale[1 - place % 2] + slack for place, number in enumerate(corners)):
            return "box_out_of_range"
        if len(corners) == 4 and (corners[2] <= corners[0] or corners[3] <= corners[1]):
            return "box_inverted"
        return None

    @property
    def picture_words(self) -> str:
        if len(self.pictures) != 1:
            return f"any of the {len(self.pictures)} pictures"
        ((height, width), _) = self.pictures[0]
        return "a row without pictures" if (height, width) == NO_SIDES else f"the picture of {width:,} x {height:,} px"


def audit_boxes(sample: Sample, sizes: Sequence[ImageSize], declared: Boxes | None) -> BoxNotes:
    """Check every box and point in the questions and answers of a sample.

    Declared boxes are held against what is declared. Undeclared ones should be from 0 to 1000, which is what Qwen3-VL
    speaks: where they cannot be but fit another convention, that is the finding.

    Args:
        sizes: of its pictures in the order of their marks, as in `Encoded.images`.
        declared: how the data says that boxes are written; None where it says nothing.
    """
    marks = list(_marks(sample, sizes, declared))
    if not marks:
        return BoxNotes()
    readings = SHARES if _are_shares(marks) else READINGS
    evidence = _evidence(marks, readings)
    fault = _sideways(sample, sizes)
    if fault is None and declared is None:
        fault = _undeclared_fault(marks, readings, evidence)
    elif fault is None and declared is not None:
        fault = _declared_fault(marks, readings, declared.convention)
    boxes = sum(mark.span.kind == "box" for mark in marks)
    return BoxNotes(boxes, len(marks) - boxes, (fault,) if fault else (), frozenset(evidence))


def judge(tally: BoxTally, declared: Boxes | None) -> str | None:
    """What the boxes of a file look like, in one sentence; None where it has none and none are declared."""
    if not tally.num_rows:
        return declared and (
            f"no boxes found, though data.boxes.convention={declared.convention} is declared: they must stand in JSON under "
            "a key such as bbox_2d or point_2d, between <|box_start|> and <|box_end|>, or be the whole answer."
        )
    boxes = f"{tally.boxes:,} box{'es' if tally.boxes != 1 else ''}" if tally.boxes else ""
    points = counted(tally.points, "point") if tally.points else ""
    total = f"{' and '.join(filter(None, (boxes, points)))} in {counted(tally.num_rows, 'row')}"
    faulty = f"; {counted(tally.faulty, 'row')} with a fault" if tally.faulty else ""
    if declared is not None:
        return f"{total}, declared as {IN_WORDS[declared.convention]}{faulty}."
    return f"{total}; {_undeclared_verdict(tally)}{faulty}."


def _undeclared_verdict(tally: BoxTally) -> str:
    rows, fits, rivals = tally.num_rows, tally.fitting("xyxy_1000"), _fitting_all(tally)
    declare = f"declare it with {_settings(rivals)}"
    if not fits:
        return "none can be from 0 to 1000" + (f", all fit {_either(rivals)}; {declare}" if rivals else "")
    fitting = f"{counted(fits, 'row')} {'fits' if fits == 1 else 'fit'} 0 to 1000"
    if fits < rows and rivals:
        # The rest of the file would be trained on in the wrong convention, row by row without a fault.
        return f"{fitting}, but all {rows:,} fit {_either(rivals)}, so that is what they seem to be; {declare}"
    unsure = sum(count for evidence, count in tally.rows.items() if evidence > {"xyxy_1000"})
    if unsure < fits:
        doubt = f", {unsure:,} would fit another convention too" if unsure else ""
        return f"{fitting}, and {fits - unsure:,} of these nothing else{doubt}"
    others = f"; if they are {_either(rivals)}, {declare}" if rivals else ""
    return f"{fitting}, which is assumed, but every one of these would fit another convention too{others}"


def _fitting_all(tally: BoxTally) -> tuple[BoxConvention, ...]:
    """Conventions other than 0 to 1000 that all rows fit."""
    return tuple(name for name in READINGS[1:] if tally.fitting(name) == tally.num_rows)


def _marks(sample: Sample, sizes: Sequence[ImageSize], declared: Boxes | None) -> Iterator[_Mark]:
    pictures = [(reference_px(sample, size, declared), size.seen_px) for size in count_videos_once(sizes)]
    fallback = declared.size_px if declared is not None and declared.size_px is not None else NO_SIDES
    for role, bare, text in marking_texts(sample, declared):
        for span in find_boxes(text, bare=bare):
            if role == "user" and not any(span.numbers):
                continue  # a question that shows the form of the answer, with zeros in it
            index = read_image_index(text, span) if len(pictures) > 1 else None
            own = pictures if index is None else pictures[index : index + 1] or pictures
            yield _Mark(span, f"{span.kind} {text[span.start : span.stop]}", tuple(own or [(fallback, fallback)]))


def _are_shares(marks: Sequence[_Mark]) -> bool:
    """Whether all numbers are at most 1 and some are fractions: no picture is so small."""
    numbers = [number for mark in marks for number in mark.span.numbers]
    return max(numbers) <= 1 + SLACK["xyxy_unit"] and any(number != int(number) for number in numbers)


def _evidence(marks: Sequence[_Mark], readings: Sequence[BoxConvention]) -> tuple[BoxConvention, ...]:
    return tuple(name for name in readings if all(mark.fault(name) is None for mark in marks))


def _sideways(sample: Sample, sizes: Sequence[ImageSize]) -> Fault | None:
    """A picture whose annotation has height and width swapped was annotated before it was turned upright."""
    annotated = annotated_px(sample)
    if annotated is None or not sizes or annotated[0] == annotated[1] or annotated[::-1] != sizes[0].original_px:
        return None
    (height, width), (upright_height, upright_width) = annotated, sizes[0].original_px
    return "box_convention", (
        f"the annotations refer to {width:,} x {height:,} px, but upright the picture has {upright_width:,} x "
        f"{upright_height:,}: it was annotated lying on its side. Annotate the upright picture, or remove its EXIF note."
    )


def _undeclared_fault(
    marks: Sequence[_Mark], readings: Sequence[BoxConvention], evidence: Sequence[BoxConvention]
) -> Fault | None:
    if "xyxy_1000" in evidence:
        return None
    odd = next((mark for mark in marks if not mark.fits(readings)), None)
    if odd is not None:
        return _fits_none(odd)
    mark = next((mark for mark in marks if mark.fault("xyxy_1000") is not None), marks[0])
    if evidence:
        return "box_convention", (
            f"the {mark.written} cannot be from 0 to 1000; in {mark.picture_words} it fits {_either(evidence)}. "
            f"Say so with {_settings(evidence)}, and boxes are converted."
        )
    return "box_convention", (
        f"the {mark.written} fits {_either(mark.fits(readings))}, but other boxes of the row do not: the row mixes "
        "conventions. Write all its boxes in one, best from 0 to 1000."
    )


def _fits_none(mark: _Mark) -> Fault:
    """The fault of a box that no convention fits: outside of both 0 to 1000 and its picture, or else inverted."""
    reach = [max(1000, *(size_px[side] for size_px, _ in mark.pictures)) for side in (1, 0)]
    if any(not 0 <= number <= reach[place % 2] for place, number in enumerate(mark.span.numbers)):
        return "box_out_of_range", (
            f"the {mark.written} lies outside of 0 to 1000 and of {mark.picture_words}, and fits no other convention. "
            "Correct it; if it is in pixels of another size, set data.boxes.convention and data.boxes.size_px."
        )
    return "box_inverted", (
        f"the {mark.written} has its second corner left of or above the first, and as x, y, width, height it does not fit "
        f"{mark.picture_words} either. Swap the corners, or say what the numbers mean with data.boxes.convention."
    )


def _declared_fault(
    marks: Sequence[_Mark], readings: Sequence[BoxConvention], convention: BoxConvention
) -> Fault | None:
    setting = f"data.boxes.convention={convention}, {IN_WORDS[convention]}"
    if readings is SHARES and convention not in SHARES:
        return "box_convention", (
            f"the {marks[0].written} is of fractions up to 1, but the data declares {setting}. "
            f"Say what it is with {_settings(SHARES)}."
        )
    for mark in marks:
        code = mark.fault(convention)
        if code is not None:
            inverted = "has its second corner left of or above the first"
            outside = f"lies outside of {mark.picture_words}" if convention.endswith("_px") else "lies outside of that"
            fits = mark.fits(readings)
            hint = f" It would fit {_either(fits)}." if fits else ""
            return code, (
                f"the {mark.written}, read as declared ({setting}), {inverted if code == 'box_inverted' else outside}. "
                f"Correct it, or declare another convention.{hint}"
            )
    return None


def _either(conventions: Sequence[BoxConvention]) -> str:
    return " or ".join(IN_WORDS[name] for name in conventions)


def _settings(conventions: Sequence[BoxConvention]) -> str:
    return f"data.boxes.convention={' or '.join(conventions)}"
