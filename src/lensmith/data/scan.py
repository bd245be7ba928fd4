"""Every row looked at once before training: what it costs, which rows are out and why; nothing is decoded or kept.

What stays in memory is a few numbers per row. The first and the last word is an identity that is always printed:

    rows in = kept + refused + dropped
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from lensmith.data.measure import ROW_NUMBERS, Chunk, Measurer
from lensmith.data.pool import CHUNK_ROWS, in_chunks
from lensmith.data.refusals import Refusals, listed
from lensmith.errors import DataError
from lensmith.types import counted

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

    from lensmith.data.source import SampleSource

Progress = Callable[[int, int], None]

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
class VideoCounts:
    """What the limits of data.video do to the different videos of a data set."""

    videos: int
    frames: int
    """Seen in all."""
    reduced: int
    """By max_tokens."""
    median_scale: float | None
    """Side seen / side on disk, of the reduced ones; None without any."""


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
    refused: Refusals
    dropped: Refusals
    """Rows over the token budget, with data.on_long=drop."""
    shrunk: tuple[int, ...]
    """Rows whose images get fewer tokens than others, to fit the budget."""
    images: ImageCounts
    videos: VideoCounts
    unlearned_answers: int
    """Earlier answers that are context only, because the chat template shows them differently once they are past."""
    thoughts: int
    """<think> parts of answers, learned or taken out as data.reasoning says."""

    def sentences(self) -> tuple[str, ...]:
        """What to tell the user; the last one is where all rows went."""
        about = (
            self._about_images,
            self._about_videos,
            self._about_shrunk,
            self._about_answers,
            self._about_thoughts,
            self._about_refused,
        )
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

    def _about_videos(self) -> str:
        counts, limits = self.videos, self.source.encoder.video
        if not counts.videos or limits is None:
            return ""
        reduced = "none reduced"
        if counts.reduced:
            reduced = (
                f"{counts.reduced:,} reduced to data.video.max_tokens={limits.max_tokens}: "
                f"sides to {counts.median_scale:.0%} in the median"
            )
        return f"{counted(counts.videos, 'video')}, of which {counted(counts.frames, 'frame')} are seen; {reduced}."

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
        named = listed([self.source.samples[row].where for row in self.shrunk[:SHOWN_ROWS]], len(self.shrunk))
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
        return (self.refused + self.dropped).sentence(SHOWN_ROWS)

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
    chunks = in_chunks(measurer.measure, len(source), workers=workers)
    scan = join_chunks(source, chunks if progress is None else _told(chunks, progress, len(source)))
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


def _told(chunks: Iterable[Chunk], progress: Progress, total: int) -> Iterator[Chunk]:
    for number, chunk in enumerate(chunks, 1):
        yield chunk
        progress(min(number * CHUNK_ROWS, total), total)


def join_chunks(source: SampleSource, chunks: Iterable[Chunk]) -> Scan:
    """What was measured of all rows, in one piece."""
    whole = Chunk()
    for chunk in chunks:
        whole.extend(chunk)
    numbers = {name: np.frombuffer(values, values.typecode) for name, values in whole.numbers.items()}
    rows, owners = numbers["rows"], np.searchsorted(numbers["rows"], numbers["image_rows"])
    return Scan(
        source=source.with_caps(whole.caps) if whole.caps else source,
        rows=rows,
        tokens=numbers["tokens"],
        learned=numbers["learned"],
        prefix_tokens=numbers["prefix_tokens"],
        groups=numbers["groups"],
        image_tokens=numbers["image_tokens"],
        pictures=_connected(rows, owners, numbers["image_keys"]),
        rows_in=len(source),
        refused=whole.refused,
        dropped=whole.dropped,
        shrunk=tuple(whole.caps),
        images=_count_images(numbers),
        videos=_count_videos(numbers),
        unlearned_answers=whole.unlearned_answers,
        thoughts=whole.thoughts,
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


def _count_images(numbers: Mapping[str, np.ndarray]) -> ImageCounts:
    scales, changes, _ = _distinct(numbers, numbers["image_frames"] == 0)
    reduced = scales[changes < 0]
    return ImageCounts(
        pictures=len(scales),
        reduced=len(reduced),
        median_scale=float(np.median(reduced)) if len(reduced) else None,
        min_scale=float(reduced.min()) if len(reduced) else None,
        enlarged=int((changes > 0).sum()),
    )


def _count_videos(numbers: Mapping[str, np.ndarray]) -> VideoCounts:
    scales, changes, frames = _distinct(numbers, numbers["image_frames"] > 0)
    reduced = scales[changes < 0]
    return VideoCounts(
        videos=len(scales),
        frames=int(frames.sum()),
        reduced=len(reduced),
        median_scale=float(np.median(reduced)) if len(reduced) else None,
    )


def _distinct(
    numbers: Mapping[str, np.ndarray], chosen: Bool[np.ndarray, " images"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scales, changes and frames of the chosen ones, each once."""
    _, first = np.unique(numbers["image_keys"][chosen], return_index=True)
    scales, changes, frames = (numbers[f"image_{name}"][chosen][first] for name in ("scales", "changes", "frames"))
    return scales, changes, frames


def _stop_for(scan: Scan, on_long: str, on_bad_row: str) -> None:
    too_long = scan.refused.of("too_long")
    stopping = scan.refused if on_bad_row == "error" else too_long if on_long == "error" else Refusals()
    if stopping:
        way_out = (
            "Mend them (`lensmith check` lists them all), or set data.on_long=shrink or drop."
            if len(stopping) == len(too_long) and on_long == "error"
            else "Mend them (`lensmith check` lists them all), or set data.on_bad_row=skip to leave them out."
        )
        lines = stopping.lines(SHOWN_ROWS)
        raise DataError(f"{len(stopping):,} of {scan.rows_in:,} rows cannot be used:\n{lines}\n{way_out}")
    if not len(scan.rows):
        lines = (scan.refused + scan.dropped).lines(SHOWN_ROWS)
        raise DataError(f"none of the {scan.rows_in:,} rows can be used:\n{lines}")


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
    return replace(
        part,
        rows_in=len(np.unique(part.rows)),
        refused=Refusals(),
        dropped=Refusals(),
        shrunk=tuple(np.intersect1d(scan.shrunk, part.rows).tolist()),
        images=ImageCounts(0, 0, None, None, 0),
        videos=VideoCounts(0, 0, 0, None),
        unlearned_answers=0,
        thoughts=0,
    )
