"""What `lensmith check` found, as plain frozen values: the screen, the JSON object and the page all read these.

rows = ok + refused        a row counts once in `refused`, however many faults it has
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lensmith.types import counted

if TYPE_CHECKING:
    from jaxtyping import Shaped

    from lensmith.check.findings import Code, Severity

Side = Literal["train", "test"]

WHERE_LIMIT = 10_000
"""Rows named per code, in order; `Finding.count` is always exact."""
EXAMPLES = 20
"""Rows per code that keep their own sentence."""
LARGEST_ROWS = 10
HISTOGRAM_BINS = 16


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a finding, with what is wrong with that very row."""

    side: Side
    row: int
    """Row number in the samples of its side, from 0."""
    where: str
    sentence: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of fault or oddity, over all files."""

    code: Code
    severity: Severity
    count: int
    """Rows; for duplicate_row and near_duplicate the surplus copies, for conflicting_answer (image, question) groups."""
    where: tuple[str, ...]
    """`file:line` of the first WHERE_LIMIT rows."""
    fix: str
    examples: tuple[Example, ...]
    """The first EXAMPLES rows, with their sentences."""


@dataclass(frozen=True, slots=True)
class FileReport:
    """What became of the rows of one data file."""

    name: str
    side: Side
    rows: int
    """Rows read; fewer than it holds only in a partial report."""
    refused: int
    layout: str
    """What was guessed about its columns."""
    boxes: str | None = None
    """What its boxes look like, in one sentence; None where answers hold none."""

    @property
    def ok(self) -> int:
        return self.rows - self.refused


@dataclass(frozen=True, slots=True)
class Spread:
    """Smallest, middle and largest of some numbers."""

    min: float
    median: float
    p95: float
    max: float
    mean: float

    @classmethod
    def of(cls, values: Shaped[np.ndarray, " values"]) -> Spread | None:
        """The spread of these numbers; None for none."""
        if not len(values):
            return None
        low, median, p95, high = np.quantile(values, [0, 0.5, 0.95, 1]).tolist()
        return cls(low, median, p95, high, float(np.mean(values)))


@dataclass(frozen=True, slots=True)
class Histogram:
    """Rows by total tokens, in bins of equal width; each bin's tokens split into image and text."""

    edges: tuple[int, ...]
    """Tokens; one more than there are bins. A row lies in edges[i] <= tokens < edges[i + 1], the last bin is closed."""
    rows: tuple[int, ...]
    image_tokens: tuple[int, ...]
    text_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LargeRow:
    """One of the rows with the most tokens."""

    side: Side
    row: int
    where: str
    tokens: int
    """As the model will see it: after data.on_long=shrink."""
    image_tokens: int


@dataclass(frozen=True, slots=True)
class TokenReport:
    """What the usable rows cost in language tokens."""

    budget: int
    """The longest row that fits one forward pass: pack.tokens, or its default."""
    total: int
    image: int
    learned: int
    per_row: Spread | None
    image_per_row: Spread | None
    learned_per_row: Spread | None
    histogram: Histogram
    largest: tuple[LargeRow, ...]

    @property
    def text(self) -> int:
        return self.total - self.image


@dataclass(frozen=True, slots=True)
class ImageReport:
    """The pictures of the usable rows."""

    uses: int
    """Pictures counted as often as rows show them."""
    pictures: int
    """Different ones, by content."""
    formats: Mapping[str, int]
    """File format -> uses."""
    reduced: int
    """Uses with fewer pixels seen than on disk, by data.image.max_tokens or to fit the token budget."""
    enlarged: int
    original_height_px: Spread | None
    original_width_px: Spread | None
    seen_height_px: Spread | None
    seen_width_px: Spread | None
    scale: Spread | None
    """Side length seen / side length on disk."""


@dataclass(frozen=True, slots=True)
class PackReport:
    """What one epoch over the usable training rows is made of."""

    samples: int
    """Samples of an epoch: rows, times their file's weight."""
    packs: int
    fill: float
    """Share of the packs' room that holds tokens, 0 to 1."""
    shared_tokens: int
    """Tokens that prefix sharing saves: images that several rows of a pack ask about."""
    steps: int
    """Optimizer steps of the whole run."""
    hours: float | None
    """Expected; None where no rate is known."""


@dataclass(frozen=True, slots=True)
class AnswerReport:
    """The last answers of the usable rows."""

    characters: Spread | None
    """Length in characters."""
    different: int
    """After case and white space are taken away."""
    most_common: tuple[str, int] | None
    """Text and rows of the one said most often."""
    scripts: Mapping[str, float]
    """Unicode script -> share of the letters of all texts, questions included; largest first."""


@dataclass(frozen=True, slots=True)
class CheckReport:
    """Everything that `lensmith check` knows about the data of one config."""

    rows: int
    """Rows read."""
    refused: int
    files: tuple[FileReport, ...]
    findings: tuple[Finding, ...]
    """Errors first, then warnings, then notes; within each, most rows first."""
    tokens: TokenReport
    images: ImageReport
    packs: PackReport
    answers: AnswerReport
    sentences: tuple[str, ...]
    """What was chosen or guessed, and what this check cannot find; to be shown with it."""
    decoded: bool
    """Whether every picture was decoded in full."""
    rows_in_all: int
    """More than `rows` where Ctrl-C stopped the reading."""
    took_s: float

    @property
    def ok(self) -> int:
        return self.rows - self.refused

    @property
    def is_partial(self) -> bool:
        return self.rows < self.rows_in_all

    @property
    def is_clean(self) -> bool:
        """Whether training may start: every row read, none refused, no error stands."""
        return not (self.refused or self.is_partial or any(f.severity == "error" for f in self.findings))

    @property
    def verdict(self) -> str:
        """The outcome in one sentence."""
        counts = {level: sum(f.severity == level for f in self.findings) for level in ("error", "warning", "note")}
        kinds = ", ".join(counted(number, level) for level, number in counts.items() if number)
        read = f"{self.rows:,} of {self.rows_in_all:,} rows read" if self.is_partial else counted(self.rows, "row")
        stopped = "Stopped by Ctrl-C, so this is only a part: " if self.is_partial else ""
        return f"{stopped}{read} = {self.ok:,} ok + {self.refused:,} refused; {kinds or 'nothing found'}."

    def finding(self, code: Code) -> Finding | None:
        """The finding of that code, if it was found."""
        return next((finding for finding in self.findings if finding.code == code), None)

    def to_json(self) -> dict[str, Any]:
        """The object that `lensmith check --json` prints; docs/check.md describes it."""
        return {
            "rows": self.rows,
            "ok": self.ok,
            "refused": self.refused,
            "partial": self.is_partial,
            "decoded": self.decoded,
            "files": {file.name: _file_json(file) for file in self.files},
            "findings": [
                {
                    "code": finding.code,
                    "severity": finding.severity,
                    "count": finding.count,
                    "where": list(finding.where),
                    "fix": finding.fix,
                }
                for finding in self.findings
            ],
            "tokens": {**asdict(self.tokens), "text": self.tokens.text},
            "images": asdict(self.images),
            "packs": asdict(self.packs),
            "answers": asdict(self.answers),
            "notes": list(self.sentences),
        }


def _file_json(file: FileReport) -> dict[str, Any]:
    return {
        "side": file.side,
        "rows": file.rows,
        "ok": file.ok,
        "refused": file.refused,
        "layout": file.layout,
        "boxes": file.boxes,
    }
