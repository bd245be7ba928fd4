"""`lensmith check --fix`: a clean copy of the data, and a list of what is not in it. The original is only read.

A row that can be used is copied in its own layout, as JSON Lines, once. Its pictures are copied byte for byte, and drawn
anew only where a reader would have to convert them: upright, in RGB, as PNG, so that no pixel changes. Boxes are written
as Qwen3-VL speaks, from 0 to 1000, where their convention is declared or all boxes of the file prove the same one.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from lensmith.check.copies import Copier
from lensmith.check.inspect import Fault, Inspector
from lensmith.check.rewrite import Rewriter
from lensmith.config.tree import Boxes
from lensmith.data.box_evidence import READINGS
from lensmith.data.boxes import convert_messages
from lensmith.data.measure import Measurer
from lensmith.data.pool import in_chunks
from lensmith.data.samples import IMAGE, VIDEO
from lensmith.data.source import Samples, SampleSource
from lensmith.errors import ConfigError, Interrupted
from lensmith.types import Message, Text, counted

if TYPE_CHECKING:
    from lensmith.check.run import Checked, Progress
    from lensmith.config.tree import BoxConvention, RunConfig
    from lensmith.data.box_evidence import BoxTally
    from lensmith.data.source import DataFile
    from lensmith.types import Role, Sample

LEFT_OUT = "left-out.ndjson"
CHUNK_ROWS = 32
"""Rows per task of a worker; each has pictures to decode and to copy."""
COPY = "duplicate_row"


@dataclass(frozen=True, slots=True)
class Cleaned:
    """What a clean copy holds, and what it does not."""

    folder: Path
    files: Mapping[Path, int]
    """Rows of each data file."""
    left_out: Mapping[str, int]
    """Code -> rows not copied; a row with several faults counts under its first."""
    converted: Mapping[Path, BoxConvention]
    """Data file -> the convention that its boxes were in."""

    def sentences(self) -> tuple[str, ...]:
        """What to tell the user."""
        wrote = ", ".join(f"{path} ({counted(rows, 'row')})" for path, rows in self.files.items())
        told = [f"Wrote {wrote}; the original is as it was."]
        if self.left_out:
            total = sum(self.left_out.values())
            codes = ", ".join(f"{count:,} {code}" for code, count in self.left_out.items())
            told.append(f"Left out {counted(total, 'row')}: {codes}. {self.folder / LEFT_OUT} gives each its reason.")
        told += [
            f"{path}: boxes are now from 0 to 1000; they were {convention}. Take data.boxes out of your settings."
            for path, convention in self.converted.items()
        ]
        return tuple(told)


@dataclass(frozen=True, slots=True)
class CleanRow:
    """One row for the copy, or the reasons why it is not in it."""

    file: int
    """Number of its file."""
    where: str
    line: str | None
    exact: int
    """Equal for copies of one row."""
    faults: tuple[Fault, ...] = ()


def refuse_full_folder(folder: Path) -> None:
    """Raise ConfigError unless the folder can be written to without touching anything."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "holds files already" if folder.is_dir() else "is a file"
        raise ConfigError(
            f"--fix {folder}: {what}; name a folder that does not exist or is empty, so that nothing is lost."
        )


def write_clean(
    checked: Checked, config: RunConfig, folder: Path, *, workers: int | None, progress: Progress
) -> Cleaned:
    """Write the clean copy of what was checked; every row is looked at again on the way.

    Raises:
        ConfigError: the folder is not empty.
        Interrupted: Ctrl-C; the copy is not whole.
    """
    refuse_full_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    total, done = sum(map(len, checked.sources.values())), itertools.count(1)
    with ExitStack() as stack:
        writer = _Writer(folder, stack)
        for side, checked_source in checked.sources.items():
            source = with_evidence(checked_source, checked.boxes[side])
            measurer = Measurer(source, checked.report.tokens.budget, config.data.on_long)
            cleaner = Cleaner(Inspector(measurer, decode=True), folder)
            writer.open(source.samples)
            try:
                for row in itertools.chain.from_iterable(
                    in_chunks(
                        cleaner.clean, len(source), workers=workers, chunk_rows=CHUNK_ROWS, parallel_rows=CHUNK_ROWS
                    )
                ):
                    writer.add(row)
                    progress(next(done), total)
            except KeyboardInterrupt as cause:
                raise Interrupted(
                    f"{folder}: stopped by Ctrl-C, so the copy is not whole. Remove it, and start the same command again."
                ) from cause
        return Cleaned(folder, writer.rows, writer.left_out, writer.converted)


def with_evidence(source: SampleSource, boxes: Mapping[int, BoxTally]) -> SampleSource:
    """The same source, with boxes of files that declare nothing read as all of their boxes prove they are written.

    Answers of the copy are always from 0 to 1000, so files that declare another target are told that one.
    """
    files = [
        replace(file, boxes=_spoken(file.boxes or _proved(boxes.get(number))))
        for number, file in enumerate(source.samples.files)
    ]
    return SampleSource(Samples(files, reasoning=source.samples.reasoning), source.encoder)


def _spoken(boxes: Boxes | None) -> Boxes | None:
    return boxes and boxes.model_copy(update={"target": "xyxy_1000"})


def _proved(tally: BoxTally | None) -> Boxes | None:
    """The one convention that every box of a file fits, unless 0 to 1000 is among those that do."""
    if tally is None or not tally.num_rows:
        return None
    fitting: list[BoxConvention] = [
        convention for convention in READINGS if tally.fitting(convention) == tally.num_rows
    ]
    if len(fitting) != 1 or fitting[0] == "xyxy_1000":
        return None
    return Boxes(convention=fitting[0])


class Cleaner:
    """Makes clean rows of those of one source; each worker process has a copy."""

    def __init__(self, inspector: Inspector, folder: Path) -> None:
        self._inspector, self._source = inspector, inspector.measurer.source
        self._copier = Copier(folder, inspector.look)

    def clean(self, start: int, stop: int) -> list[CleanRow]:
        """Rows start .. stop - 1, with their pictures copied."""
        return [self._clean_row(row) for row in range(start, stop)]

    def _clean_row(self, row: int) -> CleanRow:
        samples = self._source.samples
        number, at = samples.place(row)
        found = self._inspector.inspect(row, row + 1)
        faults = tuple(fault for fault in found.faults if fault.refuses or fault.code == "too_long")
        if not found.numbers["rows"]:
            return CleanRow(number, faults[0].where, None, 0, faults)
        file = samples.files[number]
        fields = self._rewriter(file, samples[row]).rewrite(file.rows[at].fields)
        line = json.dumps(fields, ensure_ascii=False, default=str)
        return CleanRow(number, samples[row].where, line, found.numbers["exact"][0])

    def _rewriter(self, file: DataFile, sample: Sample) -> Rewriter:
        images, videos = self._source.sizes(sample)
        sizes = [*images, *itertools.chain.from_iterable(videos)]

        def text(role: Role, written: str) -> str:
            (message,) = convert_messages([Message(role, (Text(written),))], sample, sizes, file.boxes)
            return message.text

        cells = {
            IMAGE: partial(self._copier.images, refs=file.refs, where=sample.where),
            VIDEO: partial(self._copier.videos, refs=file.refs, where=sample.where),
        }
        return Rewriter(file.layout, cells, text)


class _Writer:
    """The files of the copy: one for each data file, and the list of what was left out."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._left_out_file: TextIO | None = None
        self._targets: list[Path] = []
        self._opened: list[TextIO] = []
        self._seen: set[int] = set()
        self.rows: dict[Path, int] = {}
        self.left_out: Counter[str] = Counter()
        self.converted: dict[Path, BoxConvention] = {}

    def open(self, samples: Samples) -> None:
        """Open a file for each of the samples' files, in the place of those of the side before."""
        self._seen = set()  # a copy on the other side is a leak, which is told and left to the user
        self._targets = [self._target(file) for file in samples.files]
        self._opened = [self._create(target) for target in self._targets]

    def add(self, row: CleanRow) -> None:
        """Write a row, or why it is left out."""
        if row.line is None:
            self._leave_out(row.where, row.faults[0].code, row.faults[0].sentence)
        elif row.exact in self._seen:
            self._leave_out(row.where, COPY, "is a copy of an earlier row.")
        else:
            self._seen.add(row.exact)
            self._opened[row.file].write(row.line + "\n")
            self.rows[self._targets[row.file]] += 1

    def _leave_out(self, where: str, code: str, sentence: str) -> None:
        self.left_out[code] += 1
        told = {"where": where, "code": code, "why": sentence}
        if self._left_out_file is None:
            self._left_out_file = self._create(self._folder / LEFT_OUT)
        self._left_out_file.write(json.dumps(told, ensure_ascii=False) + "\n")

    def _target(self, file: DataFile) -> Path:
        stem = re.sub(r"[^\w.-]+", "-", Path(file.rows.name).stem) or "rows"
        names = (f"{stem}{f'-{number}' if number > 1 else ''}.jsonl" for number in itertools.count(1))
        target = next(path for name in names if (path := self._folder / name) not in self.rows and name != LEFT_OUT)
        self.rows[target] = 0
        if file.boxes is not None and file.boxes.convention != file.boxes.target:
            self.converted[target] = file.boxes.convention
        return target

    def _create(self, path: Path) -> TextIO:
        return self._stack.enter_context(path.open("w", encoding="utf-8"))
