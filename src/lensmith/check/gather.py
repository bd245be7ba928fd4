"""What worker processes found, put together: findings counted over all rows, numbers joined."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lensmith.check.findings import CODES, SEVERITIES, Code, Severity
from lensmith.check.inspect import PICTURE_NUMBERS, ROW_NUMBERS, Part
from lensmith.check.report import EXAMPLES, WHERE_LIMIT, Example, Finding, Side
from lensmith.check.texts import SCRIPTS
from lensmith.data.box_evidence import BoxTally
from lensmith.data.scan import join_chunks
from lensmith.errors import RowError

if TYPE_CHECKING:
    from jaxtyping import Int, Shaped

    from lensmith.data.measure import Chunk
    from lensmith.data.scan import Scan
    from lensmith.data.source import SampleSource


class Tally:
    """Findings as they come in, in the order of sides and rows; what is kept of each code is bounded, its count is not."""

    def __init__(self) -> None:
        self._counts: Counter[Code] = Counter()
        self._wheres: defaultdict[Code, list[str]] = defaultdict(list)
        self._examples: defaultdict[Code, list[Example]] = defaultdict(list)
        self._severities: dict[Code, Severity] = {}

    def add(self, code: Code, example: Example, *, refuses: bool = False) -> None:
        """Count one more row, and name it while there is room."""
        self.count(code)
        if len(self._wheres[code]) < WHERE_LIMIT:
            self._wheres[code].append(example.where)
        if len(self._examples[code]) < EXAMPLES:
            self._examples[code].append(example)
        if refuses:
            self._severities[code] = "error"

    def count(self, code: Code, number: int = 1) -> None:
        """Count without naming; a negative number takes back what naming has counted."""
        self._counts[code] += number

    def soften(self, code: Code) -> None:
        """Make a finding a note, because the user knows of it."""
        self._severities[code] = "note"

    def findings(self) -> tuple[Finding, ...]:
        """Errors first, then warnings, then notes; within each, most rows first."""
        found = [
            Finding(
                code=code,
                severity=self._severities.get(code, CODES[code].severity),
                count=count,
                where=tuple(self._wheres[code]),
                fix=CODES[code].fix,
                examples=tuple(self._examples[code]),
            )
            for code, count in self._counts.items()
            if count
        ]
        return tuple(sorted(found, key=lambda finding: (SEVERITIES.index(finding.severity), -finding.count)))


class Gathering:
    """The parts of one side as they come in."""

    def __init__(self, side: Side, source: SampleSource, tally: Tally) -> None:
        self.side: Side = side
        self.source, self._tally = source, tally
        self._chunks: list[Chunk] = []
        self._numbers: dict[str, list[Shaped[np.ndarray, " numbers"]]] = {
            name: [] for name in (*ROW_NUMBERS, *PICTURE_NUMBERS)
        }
        self._refused = array("q")
        self._formats: Counter[str] = Counter()
        self._boxes: defaultdict[int, BoxTally] = defaultdict(BoxTally)
        self._scripts = np.zeros(len(SCRIPTS), np.int64)
        self.num_rows = 0

    def add(self, part: Part) -> None:
        """The next rows."""
        for fault in part.faults:
            example = Example(self.side, fault.row, fault.where, fault.sentence)
            self._tally.add(fault.code, example, refuses=fault.refuses)
        self._chunks.append(part.chunk)
        for name, numbers in part.numbers.items():
            self._numbers[name].append(np.array(numbers))
        self._refused.extend(part.refused)
        self._formats += part.formats
        self._scripts += part.scripts
        for number, boxes in part.boxes.items():
            self._boxes[number] += boxes
        self.num_rows += part.num_rows

    def joined(self) -> Gathered | None:
        """All rows so far; None before the first."""
        if not self._chunks:
            return None
        # The list is emptied on the way: a million rows need not be held twice.
        numbers = {name: np.concatenate(self._numbers.pop(name)) for name in list(self._numbers)}
        return Gathered(
            side=self.side,
            scan=join_chunks(self.source, self._chunks),
            numbers=numbers,
            refused=np.array(self._refused),
            formats=self._formats,
            boxes=self._boxes,
            scripts=self._scripts,
            num_rows=self.num_rows,
        )


@dataclass(frozen=True, slots=True)
class Gathered:
    """All that is known of one side's rows."""

    side: Side
    scan: Scan
    numbers: dict[str, Shaped[np.ndarray, " numbers"]]
    """By the names of ROW_NUMBERS, one entry per usable row, and of PICTURE_NUMBERS, one per picture of such a row."""
    refused: Int[np.ndarray, " refused"]
    """Row numbers."""
    formats: Counter[str]
    boxes: Mapping[int, BoxTally]
    """By the number of the file."""
    scripts: Int[np.ndarray, " scripts"]
    num_rows: int
    """Rows read."""

    @property
    def scales(self) -> Shaped[np.ndarray, " pictures"]:
        """Side seen / side on disk of each picture."""
        seen = self.numbers["seen_heights"].astype(np.float64) * self.numbers["seen_widths"]
        return np.sqrt(seen / self.numbers["heights"] / self.numbers["widths"])

    def where(self, row: int) -> str:
        """`file:line` of a row."""
        try:
            return self.scan.source.samples[row].where
        except RowError as fault:
            return fault.where
