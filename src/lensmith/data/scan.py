"""Every row looked at once before training: what it costs, which rows are out and why; nothing is decoded or kept.

What stays in memory is a few numbers per row. The first and the last word is an identity that is always printed:

    rows in = kept + refused + dropped
"""

from __future__ import annotations

import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from lensmith.data.measure import IMAGE_NUMBERS, ROW_NUMBERS, Chunk, Measurer
from lensmith.errors import DataError
from lensmith.types import counted

if TYPE_CHECKING:
    from jaxtyping import Int

    from lensmith.data.measure import Refusal
    from lensmith.data.source import SampleSource

Progress = Callable[[int, int], None]

CHUNK_ROWS = 2_000
"""Rows between two calls of `progress`, and per task of a worker."""
PARALLEL_ROWS = 20_000
"""From so many rows on, starting processes pays."""
SHOWN_ROWS = 5
"""Rows named in a message; the rest are counted."""


@dataclass(frozen=True, slots=True)
class ImageCounts:
    """What the token limits per image do to the different pictures of a data set."""

    pictures: int
    reduced: int
    """By max_tokens."""
    median_scale: float | None
    """Side seen / side on disk, of the reduced ones; None without any."""
    min_scale: float | None
    enlarged: int
    """By min_tokens."""


@dataclass(frozen=True, slots=True)
class Scan:
    """The usable samples of a source, as arrays of equal length: one entry per sample and epoch."""

    source: SampleSource
    rows: Int[np.ndarray, " samples"]
    """Row numbers of the source, in its order; a row of weight 2 stands twice."""
    tokens: Int[np.ndarray, " samples"]
    learned: Int[np.ndarray, " samples"]
    """Tokens with a label."""
    prefix_tokens: Int[np.ndarray, " samples"]
    groups: Int[np.ndarray, " samples"]
    """Equal where the prefix is (same ids, same pixels); negative, and the row's own, without an image prefix."""
    image_tokens: Int[np.ndarray, " samples"]
    pictures: Int[np.ndarray, " samples"]
    """Equal where two samples share a picture, directly or through others; negative, and the row's own, without one."""
    rows_in: int
    refused: tuple[Refusal, ...]
    dropped: tuple[Refusal, ...]
    """Rows over the token budget, with data.on_long=drop."""
    shrunk: tuple[int, ...]
    """Rows whose images get fewer tokens than others, to fit the budget."""
    images: ImageCounts
    unlearned_answers: int
    """Earlier answers that are context only, because the chat template shows them differently once they are past."""
    thoughts: int
    """<think> parts of answers, learned or taken out as data.reasoning says."""

    def sentences(self) -> tuple[str, ...]:
        """What to tell the user; the last one is where all rows went."""
        about = (self._about_images, self._about_shrunk, self._about_answers, self._about_thoughts, self._about_refused)
        return (*(sentence for tell in about if (sentence := tell())), self._about_rows())

    def remarks(self) -> tuple[str, ...]:
        """Those of the sentences that are about what answers hold."""
        return tuple(sentence for tell in (self._about_answers, self._about_thoughts) if (sentence := tell()))

    def _about_images(self) -> str:
        images = self.images
        if not images.pictures:
            return ""
        parts = [f"{images.pictures:,} pictures"]
        if images.reduced:
            parts.append(
                f"{images.reduced:,} reduced to {self._limits(1)}: "
                f"sides to {images.median_scale:.0%} in the median, {images.min_scale:.0%} at the least"
            )
        if images.enlarged:
            parts.append(f"{images.enlarged:,} enlarged to {self._limits(0)}")
        return "; ".join(parts if len(parts) > 1 else [*parts, "none reduced, none enlarged"]) + "."

    def _limits(self, which: Literal[0, 1]) -> str:
        """The fewest or most tokens of an image, as a setting and its value; a range where files have their own."""
        name, encoder = ("min_tokens", "max_tokens")[which], self.source.encoder
        values = sorted({encoder.limits(file.limits)[which] for file in self.source.samples.files})
        if all(file.limits is None for file in self.source.samples.files):
            return f"data.image.{name}={values[0]}"
        return f"image.{name} of their file ({' to '.join(map(str, dict.fromkeys((values[0], values[-1]))))})"

    def _about_thoughts(self) -> str:
        if not self.thoughts:
            return ""
        done = "taken out" if self.source.samples.reasoning == "drop" else "learned with their answers"
        return f"{counted(self.thoughts, 'thought')} (<think>) {done}, as data.reasoning={self.source.samples.reasoning} says."

    def _about_shrunk(self) -> str:
        if not self.shrunk:
            return ""
        caps = sorted({self.source.caps[row] for row in self.shrunk})
        most = f"{caps[0]} to {caps[-1]}" if len(caps) > 1 else f"{caps[0]}"
        named = _listed([self.source.samples[row].where for row in self.shrunk[:SHOWN_ROWS]], len(self.shrunk))
        return (
            f"{counted(len(self.shrunk), 'row')} over the token budget: their images get at most {most} tokens each "
            f"({named}). Raise pack.tokens to keep them whole."
        )

    def _about_answers(self) -> str:
        if not self.unlearned_answers:
            return ""
        return (
            f"{self.unlearned_answers:,} earlier answers are read but not learned: this checkpoint's chat template shows "
            "past answers differently from how it asks for them. Split a conversation into one row per answer to learn all."
        )

    def _about_refused(self) -> str:
        out = (*self.refused, *self.dropped)
        if not out:
            return ""
        counts = Counter(refusal.code for refusal in out)
        named = [
            f"{count:,} {code} ({_listed([r.where for r in out if r.code == code][:SHOWN_ROWS], count)})"
            for code, count in counts.most_common()
        ]
        return f"Left out: {'; '.join(named)}. First: {out[0].sentence}"

    def _about_rows(self) -> str:
        kept = self.rows_in - len(self.refused) - len(self.dropped)
        dropped = f" + {len(self.dropped):,} dropped" if self.dropped else ""
        weighted = f", which data.train's weights make {len(self.rows):,} samples" if len(self.rows) != kept else ""
        return f"{self.rows_in:,} rows in = {kept:,} kept + {len(self.refused):,} refused{dropped}{weighted}."


def scan_source(
    source: SampleSource,
    *,
    budget_tokens: int,
    on_long: Literal["error", "shrink", "drop"],
    on_bad_row: Literal["error", "skip"],
    seed: int,
    progress: Progress | None = None,
    workers: int | None = None,
) -> Scan:
    """Look at every row; `seed` draws the rows of sources with a fractional weight.

    Args:
        budget_tokens: the longest sample that fits one forward pass.
        progress: called with rows done and rows in all.
        workers: processes for large data; None for one per core.

    Raises:
        DataError: rows cannot be used and may not be skipped, or none can be used; the first few are named.
    """
    measurer = Measurer(source, budget_tokens, on_long)
    chunks: list[Chunk] = []
    for chunk in _chunks(measurer, len(source), workers):
        chunks.append(chunk)
        if progress is not None:
            progress(min(len(chunks) * CHUNK_ROWS, len(source)), len(source))
    scan = join_chunks(source, chunks)
    _stop_for(scan, on_long, on_bad_row)
    return weighted(scan, seed)


def hold_out(scan: Scan, share: float, seed: int) -> tuple[Scan, Scan]:
    """The scan without, and only with, about `share` of its samples; a picture is never on both sides.

    Raises:
        DataError: all samples are connected by common pictures, so that there is nothing to part.
    """
    _, group, sizes = np.unique(scan.pictures, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        raise DataError(
            f"data.test={share}: all {len(scan.rows):,} samples are about the same pictures, so a share held out would "
            "also be trained on; name a test file instead, as in data.test=test.jsonl"
        )
    order = np.random.default_rng(seed).permutation(len(sizes))
    # The fewest whole groups that reach the share, and never all of them.
    count = min(int(np.searchsorted(np.cumsum(sizes[order]), share * len(scan.rows))) + 1, len(sizes) - 1)
    is_held = np.isin(group, order[:count])
    return _part(scan, ~is_held), _part(scan, is_held)


def _chunks(measurer: Measurer, num_rows: int, workers: int | None) -> Iterator[Chunk]:
    starts = range(0, num_rows, CHUNK_ROWS)
    spans = [(start, min(start + CHUNK_ROWS, num_rows)) for start in starts]
    processes = (os.cpu_count() or 1) if workers is None else workers
    if num_rows < PARALLEL_ROWS or processes < 2 or sys.platform != "linux":
        yield from itertools.starmap(measurer.measure, spans)
        return
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    # Forked, so that starting costs nothing and needs no __main__ guard; the children touch neither torch nor a GPU.
    with ProcessPoolExecutor(processes, get_context("fork"), _adopt, (measurer,)) as pool:
        yield from pool.map(_measure, spans)


_adopted: list[Measurer] = []
"""In a worker process only: what it measures with."""


def _adopt(measurer: Measurer) -> None:
    _adopted.append(measurer)


def _measure(span: tuple[int, int]) -> Chunk:
    return _adopted[0].measure(*span)


def join_chunks(source: SampleSource, chunks: list[Chunk]) -> Scan:
    """What was measured of all rows, in one piece."""
    names = ROW_NUMBERS | IMAGE_NUMBERS
    whole = {name: np.concatenate([np.array(chunk.numbers[name]) for chunk in chunks]) for name in names}
    caps = {row: cap for chunk in chunks for row, cap in chunk.caps.items()}
    rows, owners = whole["rows"], np.searchsorted(whole["rows"], whole["image_rows"])
    return Scan(
        source=source.with_caps(caps) if caps else source,
        rows=rows,
        tokens=whole["tokens"],
        learned=whole["learned"],
        prefix_tokens=whole["prefix_tokens"],
        groups=whole["groups"],
        image_tokens=whole["image_tokens"],
        pictures=_connected(rows, owners, whole["image_keys"]),
        rows_in=len(source),
        refused=tuple(itertools.chain.from_iterable(chunk.refused for chunk in chunks)),
        dropped=tuple(itertools.chain.from_iterable(chunk.dropped for chunk in chunks)),
        shrunk=tuple(caps),
        images=_count_images(whole["image_keys"], whole["image_scales"], whole["image_changes"]),
        unlearned_answers=sum(chunk.unlearned_answers for chunk in chunks),
        thoughts=sum(chunk.thoughts for chunk in chunks),
    )


def _connected(
    rows: Int[np.ndarray, " rows"], owners: Int[np.ndarray, " images"], keys: Int[np.ndarray, " images"]
) -> Int[np.ndarray, " rows"]:
    """One number per set of rows that common pictures connect; `owners` says which row each image belongs to.

    Least labels spread from rows to images and back until nothing changes; following labels of labels makes that a few
    rounds even for a chain in which each row shares one picture with the next.
    """
    labels = np.arange(len(rows))
    distinct, image = np.unique(keys, return_inverse=True)
    while True:
        least = np.full(len(distinct), len(rows))
        np.minimum.at(least, image, labels[owners])
        spread = labels.copy()
        np.minimum.at(spread, owners, least[image])
        # A row that was relabelled hands its new label to the row whose number it used to carry.
        np.minimum.at(spread, labels, spread.copy())
        spread = spread[spread]
        if (spread == labels).all():
            break
        labels = spread
    labels[np.bincount(owners, minlength=len(rows)) == 0] = -1
    return np.where(labels < 0, -1 - rows, labels)


def _count_images(keys: np.ndarray, scales: np.ndarray, changes: np.ndarray) -> ImageCounts:
    _, first = np.unique(keys, return_index=True)
    reduced = scales[first][changes[first] < 0]
    return ImageCounts(
        pictures=len(first),
        reduced=len(reduced),
        median_scale=float(np.median(reduced)) if len(reduced) else None,
        min_scale=float(reduced.min()) if len(reduced) else None,
        enlarged=int((changes[first] > 0).sum()),
    )


def _stop_for(scan: Scan, on_long: str, on_bad_row: str) -> None:
    too_long = [refusal for refusal in scan.refused if refusal.code == "too_long"]
    stopping = scan.refused if on_bad_row == "error" else too_long if on_long == "error" else ()
    if stopping:
        way_out = (
            "Mend them, or set data.on_long=shrink or drop."
            if len(stopping) == len(too_long) and on_long == "error"
            else "Mend them, or set data.on_bad_row=skip to leave them out."
        )
        raise DataError(f"{len(stopping):,} of {scan.rows_in:,} rows cannot be used:\n{_first(stopping)}\n{way_out}")
    if not len(scan.rows):
        raise DataError(f"none of the {scan.rows_in:,} rows can be used:\n{_first((*scan.refused, *scan.dropped))}")


def _first(refusals: tuple[Refusal, ...] | list[Refusal]) -> str:
    lines = [f"  {refusal.where}: {refusal.sentence}" for refusal in refusals[:SHOWN_ROWS]]
    more = len(refusals) - len(lines)
    return "\n".join([*lines, f"  and {more:,} more"] if more else lines)


def _listed(names: list[str], total: int) -> str:
    return ", ".join(names) + (f" and {total - len(names):,} more" if total > len(names) else "")


def weighted(scan: Scan, seed: int) -> Scan:
    """Rows of each file as often as its weight says: whole repeats, and a seeded part of them once more."""
    spans = scan.source.samples.spans
    if all(weight == 1 for _, weight in spans):
        return scan
    generator = np.random.default_rng(seed)
    chosen = []
    for span, weight in spans:
        start, stop = np.searchsorted(scan.rows, [span.start, span.stop])
        indices = np.arange(start, stop)
        repeats, rest = divmod(weight, 1)
        part = generator.choice(indices, round(rest * len(indices)), replace=False)
        chosen += [np.tile(indices, int(repeats)), np.sort(part)]
    indices = np.concatenate(chosen)
    if not len(indices):
        raise DataError(f"the weights of data.train leave none of {len(scan.rows):,} usable rows; raise them")
    return _pick(scan, indices)


def _pick(scan: Scan, indices: np.ndarray) -> Scan:
    return replace(scan, **{name: getattr(scan, name)[indices] for name in (*ROW_NUMBERS, "pictures")})


def _part(scan: Scan, chosen: np.ndarray) -> Scan:
    part = _pick(scan, np.flatnonzero(chosen))
    held = set(part.rows.tolist())
    return replace(
        part,
        rows_in=len(held),
        refused=(),
        dropped=(),
        shrunk=tuple(row for row in scan.shrunk if row in held),
        images=ImageCounts(0, 0, None, None, 0),
        unlearned_answers=0,
        thoughts=0,
    )
