"""Data files opened and understood: samples and encoded samples by number, read when asked for.

read_samples("rows.jsonl")       a lazy list of samples, for looking at data and for evaluation
open_source(config.data, ...)    the same with an encoder, for scanning and training
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from lensmith.config.tree import Boxes, Data, Source
from lensmith.data.boxes import describe_conversion
from lensmith.data.headers import Header, read_header
from lensmith.data.images import check_policy, open_image, size_image
from lensmith.data.refs import RefReader
from lensmith.data.rows import Rows, open_rows
from lensmith.data.samples import Layout, guess_layout, to_sample
from lensmith.data.video import check_video
from lensmith.errors import ConfigError, RowError
from lensmith.types import Encoded, ImageRef, ImageSize, Sample, TokenLimits

if TYPE_CHECKING:
    from lensmith.data.encode import Encoder

Which = Literal["train", "test"]

KNOWN_HEADERS = 16_384
"""Picture headers remembered per process, about 400 bytes each; the oldest are forgotten first. Rows about one picture
stand close together, so more would not help."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """One of the files that the samples come from."""

    rows: Rows
    layout: Layout
    refs: RefReader
    weight: float
    limits: TokenLimits | None
    """Of its pictures, where they are not those of data.image."""
    boxes: Boxes | None
    """How its boxes are written; None where nothing says so."""

    @property
    def sentences(self) -> tuple[str, ...]:
        """What was fetched, what was guessed of its columns, and what is done to its boxes."""
        # An annotation format has no columns to guess; it says what was found itself.
        guessed = () if self.rows.boxes is not None else (self.layout.sentence,)
        converted = (f"{self.rows.name}: {clause}" for clause in describe_conversion(self.boxes))
        return (*self.rows.sentences, *guessed, *converted)


class Samples(Sequence[Sample]):
    """A lazy list of samples over one or more files; reading one may raise RowError, for that row alone."""

    def __init__(self, files: Sequence[DataFile], *, reasoning: Literal["keep", "drop"]) -> None:
        self.files = tuple(files)
        self.reasoning: Literal["keep", "drop"] = reasoning
        self._stops = np.cumsum([len(file.rows) for file in files])

    @property
    def sentences(self) -> tuple[str, ...]:
        """What was fetched, what was guessed about each file, and what is done to its boxes, to print."""
        return tuple(itertools.chain.from_iterable(file.sentences for file in self.files))

    @property
    def spans(self) -> list[tuple[range, float]]:
        """Row numbers of each file, and how often each of its rows is to be seen per epoch."""
        starts = [0, *self._stops[:-1].tolist()]
        return [
            (range(start, stop), file.weight)
            for start, stop, file in zip(starts, self._stops.tolist(), self.files, strict=True)
        ]

    def __len__(self) -> int:
        return int(self._stops[-1])

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} rows, no row {index}")
        return self.read(index % len(self))

    def read(self, index: int, faults: list[RowError] | None = None) -> Sample:
        """The sample of that row number, from 0; `faults` collects all that is wrong with it, as in `to_sample`."""
        number, at = self.place(index)
        file = self.files[number]
        row = file.rows[at]
        sample = to_sample(row, file.layout, file.refs, reasoning=self.reasoning, limits=file.limits, faults=faults)
        return sample if file.boxes is None else replace(sample, boxes=file.boxes)

    def place(self, index: int) -> tuple[int, int]:
        """Number of the file that holds a row, and the row's number in that file."""
        number = int(np.searchsorted(self._stops, index, side="right"))
        return number, index - int(self._stops[number]) + len(self.files[number].rows)


class SampleSource:
    """Samples with the encoder of one checkpoint; picklable, for data workers."""

    def __init__(self, samples: Samples, encoder: Encoder, caps: Mapping[int, int] | None = None) -> None:
        """`caps`: row number -> tokens that each image of that row may cost, where that is less than for other rows."""
        self.samples, self.encoder, self.caps = samples, encoder, dict(caps or {})
        self._headers: dict[str, Header] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_headers": {}}

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def sentences(self) -> tuple[str, ...]:
        """What was guessed about each file, to print."""
        return self.samples.sentences

    def with_caps(self, caps: Mapping[int, int]) -> SampleSource:
        """The same source, with smaller images in those rows."""
        return SampleSource(self.samples, self.encoder, {**self.caps, **caps})

    def sample(self, row: int) -> Sample:
        """The checked sample of that row number.

        Raises:
            RowError: the row cannot be used.
        """
        return self.samples[row]

    def encoded(self, row: int) -> Encoded:
        """Ids, labels and image sizes of that row number; no pixel is read.

        Raises:
            RowError: the row, or one of its images, cannot be used.
        """
        return self.encode(self.samples[row], max_tokens=self.caps.get(row))

    def encode(self, sample: Sample, *, max_tokens: int | None = None, check: bool = False) -> Encoded:
        """Ids, labels and image sizes of a sample; with `check`, pictures and videos that were cut off are refused too.

        `max_tokens`: most of one image, and of one moment of a video.
        """
        return self.encoder.encode(sample, *self.sizes(sample, max_tokens=max_tokens, check=check))

    def sizes(
        self, sample: Sample, *, max_tokens: int | None = None, check: bool = False
    ) -> tuple[list[ImageSize], list[tuple[ImageSize, ...]]]:
        """What each image costs, and each moment of each video; for the arguments see `encode`."""
        encoder = self.encoder
        least, most = encoder.limits(sample.limits)
        try:
            images = [
                size_image(
                    ref,
                    encoder.geometry,
                    min_tokens=least,
                    max_tokens=max_tokens or most,
                    original_px=self.header(ref, check=check).upright_px,
                )
                for ref in sample.images
            ]
            videos = [encoder.size_video(video, max_tokens) for video in sample.videos]
            if check:
                for moments in videos:
                    check_video(moments)
        except RowError as fault:
            raise fault.at(sample.where) from fault
        return images, videos

    def header(self, ref: ImageRef, *, check: bool = False) -> Header:
        """What the picture's file says of itself; read once for rows that follow one another.

        Args:
            check: also refuses a picture that was cut off; one that does not end with its end mark is decoded to be sure.

        Raises:
            RowError: the picture cannot be used.
        """
        header = self._headers.get(ref.key)
        if header is not None and (header.is_whole or not check):
            return header
        header = header or read_header(ref)
        if check and not header.is_whole:
            open_image(ref)
            header = replace(header, is_whole=True)
        if len(self._headers) >= KNOWN_HEADERS:
            del self._headers[next(iter(self._headers))]
        self._headers[ref.key] = header
        return header


def open_source(data: Data, encoder: Encoder, *, which: Which, samples: Samples | None = None) -> SampleSource:
    """The files of data.train or data.test, with an encoder.

    Args:
        samples: those of `which`, where they are open already.

    Raises:
        ConfigError: the config names no such file, or token limits that contradict.
        DataError: a file is missing or empty, or no column of it looks like the answer.
    """
    samples = read_samples(data, which=which) if samples is None else samples
    for number, file in enumerate(samples.files):
        if file.limits is not None:
            check_policy(*encoder.limits(file.limits), setting=f"data.{which}[{number}].image")
    return SampleSource(samples, encoder)


def read_samples(data: Data | str | Path, *, which: Which = "train") -> Samples:
    """Samples of a data file, or of the data section of a config, as a lazy list.

        for sample in read_samples("rows.jsonl"):
            print(sample.question, sample.answer)

    Raises:
        ConfigError: the config names no such file.
        DataError: a file is missing or empty, or no column of it looks like the answer.
    """
    if not isinstance(data, Data):
        data = Data(train=str(data))
        which = "train"
    files = []
    for source in _sources(data, which):
        rows = open_rows(source.path)
        layout = guess_layout(rows, data.columns)
        refs = RefReader(data.image_root or rows.root, allow_urls=data.allow_urls, allow_outside=data.allow_outside)
        own = source.image and TokenLimits(source.image.min_tokens, source.image.max_tokens)
        boxes = source.boxes or data.boxes or rows.boxes
        files.append(DataFile(rows, layout, refs, source.weight, own, boxes))
    return Samples(files, reasoning=data.reasoning)


def _sources(data: Data, which: Which) -> list[Source]:
    named = getattr(data, which)
    if isinstance(named, str):
        return [Source(path=named)]
    if isinstance(named, list) and named:
        return named
    held_out = " It is a share, which is held out of data.train." if isinstance(named, float) else ""
    raise ConfigError(
        f"data.{which} names no data file (it is {named!r}).{held_out} Set it, as in data.{which}=rows.jsonl."
    )
