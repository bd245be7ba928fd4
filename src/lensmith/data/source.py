"""Data files opened and understood: samples and encoded samples by number, read when asked for.

read_samples("rows.jsonl")       a lazy list of samples, for looking at data and for evaluation
open_source(config.data, ...)    the same with an encoder, for scanning and training
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from lensmith.config.tree import Data, Source
from lensmith.data.images import check_whole, header_px, size_image
from lensmith.data.rows import Rows, open_rows
from lensmith.data.samples import Layout, guess_layout, to_sample
from lensmith.errors import ConfigError, RowError
from lensmith.types import Encoded, ImageRef, Sample

if TYPE_CHECKING:
    from lensmith.data.encode import Encoder

Which = Literal["train", "test"]

KNOWN_SIZES = 65_536
"""Image sizes remembered per process, about 150 bytes each; the oldest are forgotten first."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """One of the files that the samples come from."""

    rows: Rows
    layout: Layout
    image_root: Path
    weight: float


class Samples(Sequence[Sample]):
    """A lazy list of samples over one or more files; reading one may raise RowError, for that row alone."""

    def __init__(self, files: Sequence[DataFile], *, allow_urls: bool) -> None:
        self.files, self._allow_urls = tuple(files), allow_urls
        self._stops = np.cumsum([len(file.rows) for file in files])

    @property
    def sentences(self) -> tuple[str, ...]:
        """What was guessed about each file, to print."""
        return tuple(file.layout.sentence for file in self.files)

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
        number = int(np.searchsorted(self._stops, index, side="right"))
        file = self.files[number]
        row = file.rows[index - int(self._stops[number]) + len(file.rows)]
        return to_sample(row, file.layout, image_root=file.image_root, allow_urls=self._allow_urls, faults=faults)


class SampleSource:
    """Samples with the encoder of one checkpoint; picklable, for data workers."""

    def __init__(self, samples: Samples, encoder: Encoder, caps: Mapping[int, int] | None = None) -> None:
        """`caps`: row number -> tokens that each image of that row may cost, where that is less than for other rows."""
        self.samples, self.encoder, self.caps = samples, encoder, dict(caps or {})
        self._sizes: dict[str, tuple[int, int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sizes": {}}

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
        """Ids, labels and image sizes of a sample; with `check`, pictures that were cut off are refused too."""
        encoder = self.encoder
        try:
            sizes = [
                size_image(
                    ref,
                    encoder.geometry,
                    min_tokens=encoder.min_tokens,
                    max_tokens=max_tokens or encoder.max_tokens,
                    original_px=self._original_px(ref, check),
                )
                for ref in sample.images
            ]
        except RowError as fault:
            raise fault.at(sample.where) from fault
        return encoder.encode(sample, sizes)

    def _original_px(self, ref: ImageRef, check: bool) -> tuple[int, int]:
        known = self._sizes.get(ref.key)
        if known is None:
            known = header_px(ref)
            if check:
                check_whole(ref)
            if len(self._sizes) >= KNOWN_SIZES:
                del self._sizes[next(iter(self._sizes))]
            self._sizes[ref.key] = known
        return known


def open_source(data: Data, encoder: Encoder, *, which: Which) -> SampleSource:
    """The files of data.train or data.test, with an encoder.

    Raises:
        ConfigError: the config names no such file.
        DataError: a file is missing or empty, or no column of it looks like the answer.
    """
    return SampleSource(read_samples(data, which=which), encoder)


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
        root = rows.root if data.image_root is None else data.image_root.expanduser()
        files.append(DataFile(rows, layout, root, source.weight))
    return Samples(files, allow_urls=data.allow_urls)


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
