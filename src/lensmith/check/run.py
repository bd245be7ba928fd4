"""The check itself: open the data, read every row in parallel, compare, sum up. Bad data is found here, never raised."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lensmith.check.gather import Gathering, Tally
from lensmith.check.inspect import Inspector
from lensmith.check.judge import judge_rows
from lensmith.check.opening import choose_budget, known_rate, open_encoder, open_sides
from lensmith.check.report import CheckReport, Side
from lensmith.check.summary import (
    report_answers,
    report_files,
    report_images,
    report_packs,
    report_tokens,
    training_rows,
)
from lensmith.data.measure import Measurer
from lensmith.data.pool import CHUNK_ROWS, PARALLEL_ROWS, in_chunks
from lensmith.data.source import SampleSource, open_source

if TYPE_CHECKING:
    from lensmith.config.tree import RunConfig
    from lensmith.data.box_evidence import BoxTally

Say = Callable[[Any], None]
Progress = Callable[[int, int], None]

DECODED_CHUNK_ROWS = 32
"""Rows per task where pictures are decoded, about a second of work; for fewer, starting processes does not pay."""

QUICK = (
    "Headers and end marks were read, pictures were not decoded: damage inside a file and near duplicates are not found, "
    "and files count as the same by their size and both ends. Leave --quick out to find them."
)


@dataclass(frozen=True, slots=True)
class Checked:
    """The report, and the data it is about."""

    report: CheckReport
    sources: Mapping[Side, SampleSource]
    """As read, with smaller images in rows that did not fit the budget."""
    boxes: Mapping[Side, Mapping[int, BoxTally]]
    """What the boxes of each file prove, by the file's number."""


def run_check(
    config: RunConfig,
    *,
    decode: bool = True,
    workers: int | None = None,
    say: Say = lambda _: None,
    progress: Progress = lambda done, total: None,
) -> Checked:
    """Read every row of data.train, and of data.test where it is a file.

    Args:
        decode: whether every picture is decoded; otherwise headers and end marks are read.
        workers: processes; None for data.workers, or one per core.
        say: told what is guessed and assumed, before reading starts.
        progress: told rows done and rows in all. Ctrl-C ends the reading, and the report is then of the rows so far.

    Raises:
        ConfigError, DataError: there is no data file, or it is missing or empty as a whole.
        ModelError: config.model is no Qwen3-VL.
    """
    started = time.monotonic()
    samples = open_sides(config)  # first, because a wrong path should be told at once
    encoder, told = open_encoder(config)
    sources: dict[Side, SampleSource] = {
        side: open_source(config.data, encoder, which=side, samples=opened) for side, opened in samples.items()
    }
    budget_tokens, assumed = choose_budget(config)
    sentences = [*told, *assumed, *([] if decode else [QUICK])]
    for sentence in (*(line for source in sources.values() for line in source.sentences), *sentences):
        say(sentence)
    tally = Tally()
    gatherings: dict[Side, Gathering] = {side: Gathering(side, source, tally) for side, source in sources.items()}
    workers = config.data.workers if workers is None else workers
    _read(gatherings, config, budget_tokens, decode=decode, workers=workers, progress=progress)
    sides = [gathered for gathering in gatherings.values() if (gathered := gathering.joined())]
    judge_rows(sides, tally, allow_shrink=config.data.image.allow_shrink)
    training, held_out = training_rows(sides, config)
    report = CheckReport(
        rows=sum(side.num_rows for side in sides),
        refused=sum(len(side.refused) for side in sides),
        files=report_files(sides),
        findings=tally.findings(),
        tokens=report_tokens(sides, budget_tokens),
        images=report_images(sides),
        packs=report_packs(training, config, budget_tokens, known_rate(config)),
        answers=report_answers(sides),
        sentences=(*sentences, *held_out, *(line for side in sides for line in side.scan.remarks())),
        decoded=decode,
        rows_in_all=sum(map(len, sources.values())),
        took_s=time.monotonic() - started,
    )
    return Checked(report, {side.side: side.scan.source for side in sides}, {side.side: side.boxes for side in sides})


def _read(
    gatherings: Mapping[Side, Gathering],
    config: RunConfig,
    budget_tokens: int,
    *,
    decode: bool,
    workers: int | None,
    progress: Progress,
) -> None:
    """Read the rows of all sides, until the end or Ctrl-C."""
    total = sum(len(gathering.source) for gathering in gatherings.values())
    chunk_rows, parallel_rows = (DECODED_CHUNK_ROWS,) * 2 if decode else (CHUNK_ROWS, PARALLEL_ROWS)
    done = 0
    try:
        for gathering in gatherings.values():
            inspector = Inspector(Measurer(gathering.source, budget_tokens, config.data.on_long), decode=decode)
            for part in in_chunks(
                inspector.inspect,
                len(gathering.source),
                workers=workers,
                chunk_rows=chunk_rows,
                parallel_rows=parallel_rows,
            ):
                with _uninterrupted():
                    gathering.add(part)
                done += part.num_rows
                progress(done, total)
    except KeyboardInterrupt:
        return  # the report says how far it came


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block: rows half added would have some of their numbers and not the others."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread is interrupted
        yield
        return
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt
