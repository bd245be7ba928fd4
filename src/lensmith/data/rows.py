"""Rows as found on disk, one at a time: memory holds where each row lies, never the rows.

Text formats are an index of byte spans into the file as it is (24 bytes per row, whatever the row holds); Parquet files
and Hugging Face data sets are memory-mapped by `datasets`. All are picklable, so data workers open the same file.

    rows.jsonl  rows.json  rows.csv  rows.tsv  rows.parquet     a file
    charts/                                                     a folder: images beside one such file
    instances.json   set/ (images and labels)   set/ (*.json)   COCO, YOLO, LabelMe: see lensmith.data.annotations
    hf://datasets/owner/name/rows.jsonl   s3://...   gs://...   a file elsewhere
    charts/ (from save_to_disk)   owner/name   owner/name:test  a Hugging Face data set
"""

from __future__ import annotations

import csv
import difflib
import io
import os
import re
import weakref
from abc import abstractmethod
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from lensmith.data.json_text import NotJson, parse_json
from lensmith.data.remote import fetch_file, is_remote, parent
from lensmith.data.spans import Span, csv_delimiter, csv_spans, json_spans, line_spans, starts_array
from lensmith.errors import DataError, RowError
from lensmith.types import Row

if TYPE_CHECKING:
    import datasets

    from lensmith.config.tree import Boxes

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
SHARD = re.compile(r"-\d{5}-of-\d{5}$")
"""How the Hub names the parts of one data set: train-00000-of-00003.parquet."""
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?")


class Rows(Sequence[Row]):
    """A lazy list of rows; reading one may raise RowError, for that row alone."""

    name: str
    """How messages call it."""
    root: Path | str
    """The folder that relative image paths start from; a string where it is at an address."""
    sentences: tuple[str, ...] = ()
    """What was done to have the rows here, to print."""
    boxes: Boxes | None = None
    """How boxes are written in its answers, where the format says so."""

    @abstractmethod
    def read(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self.read(number) for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} rows, no row {index}")
        return self.read(index % len(self))

    def __iter__(self) -> Iterator[Row]:
        return map(self.read, range(len(self)))


def open_rows(path: str | Path) -> Rows:
    """The rows of a data file, a folder with one, or a data set; only their places are read.

    Raises:
        DataError: there is no such file, or it is empty, or a folder holds none or several, each with the way out.
    """
    if isinstance(path, str) and is_remote(path):
        return _open_remote(path)
    place = Path(path).expanduser()
    if place.is_dir():
        return _open_folder(place)
    if place.is_file():
        return _open_files([place])
    name = str(path)
    if place.suffix.lower() in DATA_SUFFIXES or place.parent.is_dir() or not HUB_NAME.fullmatch(name):
        raise DataError(f"{path}: there is no such file or folder{_near_names(place)}")
    return _open_hub(name)


def map_rows(dataset: datasets.Dataset, name: str, root: Path) -> Rows:
    """The rows of a Hugging Face data set in hand; pictures as they are stored, not decoded.

    Raises:
        DataError: it is empty.
    """
    return _MappedRows(dataset, name, root)


def _open_remote(address: str) -> Rows:
    kept, sentence = fetch_file(address)
    rows = _open_files([kept])
    rows.root, rows.sentences = parent(address), (sentence, *rows.sentences)
    return rows


class _SpanRows(Rows):
    """Rows of a text file, each the parse of some of its bytes."""

    def __init__(self, path: Path, spans: Iterator[Span]) -> None:
        self.path, self.name, self.root = path, path.name, path.parent
        starts, stops, labels = array("q"), array("q"), array("q")
        for start, stop, label in spans:
            starts.append(start)
            stops.append(stop)
            labels.append(label)
        if not starts:
            raise DataError(f"{path}: no rows in {path.stat().st_size} bytes; is this the right file?")
        self._starts, self._stops, self._labels = starts, stops, labels
        self._descriptor: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, index: int) -> str:
        return f"{self.name}:{self._labels[index]}"

    def read(self, index: int) -> Row:
        where = self.where(index)
        try:
            text = self._bytes(self._starts[index], self._stops[index]).decode()
        except UnicodeDecodeError as cause:
            raise RowError(where, "not_json", f"is not UTF-8 text ({cause.reason}); save the file as UTF-8.") from cause
        return Row(where, self.parse(where, text.removeprefix("\ufeff")))

    def _bytes(self, start: int, stop: int) -> bytes:
        if not hasattr(os, "pread"):  # Windows
            with self.path.open("rb") as file:
                file.seek(start)
                return file.read(stop - start)
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
        # Not seek and read: processes that were forked share the place in the file.
        return os.pread(self._descriptor, stop - start, start)

    @abstractmethod
    def parse(self, where: str, text: str) -> Mapping[str, Any]: ...


class _JsonRows(_SpanRows):
    """JSON Lines, or the elements of one JSON array."""

    def __init__(self, path: Path) -> None:
        self._in_array = starts_array(path)
        super().__init__(path, json_spans(path) if self._in_array else line_spans(path))

    def where(self, index: int) -> str:
        return f"{self.name}#{index}" if self._in_array else super().where(index)

    def parse(self, where: str, text: str) -> Mapping[str, Any]:
        try:
            fields = parse_json(text)
        except NotJson as cause:
            shown = text.strip()[:60]
            raise RowError(
                where, "not_json", f"not JSON ({cause}): {shown!r}. Each row is one object on one line."
            ) from cause
        if not isinstance(fields, dict) or not fields:
            kind = "an empty object" if fields == {} else f"a JSON {type(fields).__name__}"
            raise RowError(where, "malformed_row", f"holds {kind}; a row is an object of columns: {{...}}.")
        return fields


class _CsvRows(_SpanRows):
    """Comma- or tab-separated values under one header line; every cell is a string."""

    def __init__(self, path: Path) -> None:
        # A limit of the csv module, not of ours: its 128 KiB per cell are too few for a picture in base64.
        csv.field_size_limit(2**31 - 1)
        self._delimiter = csv_delimiter(path)
        spans = csv_spans(path, self._delimiter)
        start, stop, _ = next(spans, (0, 0, 0))
        with path.open("rb") as file:
            file.seek(start)
            first_line = file.read(stop - start)
        try:
            header = self._cells(first_line.decode("utf-8-sig"))
        except UnicodeDecodeError as cause:
            raise DataError(f"{path}: is not UTF-8 text ({cause.reason}); save it again as UTF-8 CSV") from cause
        self.columns = [name.strip() for name in header]
        doubled = sorted({name for name in self.columns if self.columns.count(name) > 1})
        if doubled or not any(self.columns):
            what = f"names the column {doubled[0]!r} twice" if doubled else "names no columns"
            raise DataError(
                f"{path}: the first line {what}; it must name each column once, as in image,question,answer"
            )
        super().__init__(path, spans)

    def parse(self, where: str, text: str) -> Mapping[str, Any]:
        cells = self._cells(text)
        if len(cells) != len(self.columns):
            raise RowError(
                where,
                "malformed_row",
                f"has {len(cells)} cells but the first line names {len(self.columns)} columns; "
                'put text that holds the separator in "double quotes".',
            )
        return dict(zip(self.columns, cells, strict=True))

    def _cells(self, text: str) -> list[str]:
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter), [])


class _MappedRows(Rows):
    """Rows of a memory-mapped data set; class labels by name, images as the bytes or path they are stored as."""

    def __init__(self, dataset: datasets.Dataset, name: str, root: Path) -> None:
        from datasets import ClassLabel

        if not len(dataset) or not dataset.column_names:
            raise DataError(
                f"{name}: holds {len(dataset)} rows of {len(dataset.column_names)} columns; nothing to read"
            )
        self.name, self.root = name, root
        self._dataset = dataset.cast(_undecoded(dataset.features)) if _has_media(dataset.features) else dataset
        self._labels = {
            column: feature.names for column, feature in dataset.features.items() if isinstance(feature, ClassLabel)
        }

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, index: int) -> Row:
        where = f"{self.name}#{index}"
        try:
            fields = dict(self._dataset[index])
        except UnicodeDecodeError as cause:
            raise RowError(
                where, "malformed_row", f"holds text that is not UTF-8 ({cause.reason}); mend it."
            ) from cause
        for column, names in self._labels.items():
            fields[column] = _label(fields[column], names, column, where)
        return Row(where, fields)


def _label(value: int | None, names: Sequence[str], column: str, where: str) -> str | None:
    """A class label by name; -1 is how test splits write that there is none."""
    if value is None or value == -1:
        return None
    if not 0 <= value < len(names):
        sentence = f"{column!r} is {value}, but there are {len(names)} labels, from 0; mend the label."
        raise RowError(where, "malformed_row", sentence)
    return names[value]


def _has_media(feature: Any) -> bool:
    from datasets import LargeList, List

    if isinstance(feature, Mapping):
        return any(map(_has_media, feature.values()))
    if isinstance(feature, (List, LargeList)):
        return _has_media(feature.feature)
    return isinstance(feature, _media())


def _undecoded(feature: Any) -> Any:
    """The same features with every picture, film and document left as stored: decoded when, and if, it is needed."""
    from datasets import Features, LargeList, List

    if isinstance(feature, Mapping):
        changed = {name: _undecoded(inner) for name, inner in feature.items()}
        return Features(changed) if isinstance(feature, Features) else changed
    if isinstance(feature, (List, LargeList)):
        return List(_undecoded(feature.feature))
    return replace(feature, decode=False) if isinstance(feature, _media()) else feature


def _media() -> tuple[type, ...]:
    from datasets import Audio, Image, Pdf, Video

    return Audio, Image, Pdf, Video


def _open_files(paths: list[Path]) -> Rows:
    from lensmith.data.annotations import open_annotations

    first, suffix = paths[0], paths[0].suffix.lower()
    if (annotated := open_annotations(first)) is not None:
        return annotated
    if suffix not in DATA_SUFFIXES:
        raise DataError(f"{first}: is a {suffix or 'nameless'} file; Lensmith reads {', '.join(DATA_SUFFIXES)}")
    if any(path.stat().st_size == 0 for path in paths):
        raise DataError(f"{first}: is empty (0 bytes); write the rows to it, or name another file")
    if suffix == ".parquet":
        return _open_parquet(paths)
    return (_CsvRows if suffix in (".csv", ".tsv") else _JsonRows)(first)


def _open_parquet(paths: list[Path]) -> Rows:
    import pyarrow
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        dataset = load_dataset("parquet", data_files=[str(path) for path in paths], split="train")
    except (DatasetGenerationError, pyarrow.ArrowException) as cause:
        raise DataError(
            f"{paths[0]}: cannot be read as Parquet ({cause.__cause__ or cause}); write it again"
        ) from cause
    return _MappedRows(dataset, SHARD.sub("", paths[0].stem) + paths[0].suffix, paths[0].parent)  # pyright: ignore[reportArgumentType]


def _open_folder(folder: Path) -> Rows:
    from lensmith.data.annotations import open_annotations

    if (annotated := open_annotations(folder)) is not None:
        return annotated
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        from datasets import load_from_disk

        return _MappedRows(_one_split(load_from_disk(str(folder)), str(folder)), folder.name, folder)
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in DATA_SUFFIXES and path.is_file())
    if len(files) > 1 and len({SHARD.sub("", path.stem) for path in files}) == 1 and files[0].suffix == ".parquet":
        return _open_files(files)
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise DataError(f"{folder}: holds {len(files)} data files ({names}); name the one to read, as in {files[0]}")
    if not files:
        raise DataError(
            f"{folder}: holds no data file; put one of {', '.join(DATA_SUFFIXES)} with questions and answers "
            "beside the images, or name it with its path"
        )
    return _open_files(files)


def _one_split(loaded: Any, name: str, wanted: str | None = None) -> Any:
    if not isinstance(loaded, Mapping):
        return loaded
    choice = wanted or ("train" if "train" in loaded else next(iter(loaded)) if len(loaded) == 1 else None)
    if choice not in loaded:
        raise DataError(f"{name}: has the splits {', '.join(loaded)}, and none named {wanted or 'train'!r}; pick one")
    return loaded[choice]


def _open_hub(name: str) -> Rows:
    from datasets import config, load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    repository, _, split = name.partition(":")
    try:
        loaded = load_dataset(repository)
    # RuntimeError: the data set is a loading script, which `datasets` no longer runs and neither do we.
    except (OSError, ValueError, RuntimeError, HfHubHTTPError, OfflineModeIsEnabled, DatasetsError) as cause:
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        raise DataError(
            f"{name}: there is no such file or folder, "
            f"and no data set of that name could be loaded from the Hugging Face Hub ({reason}); check the name."
        ) from cause
    # Pictures that are files of their own come with the cache's paths to them.
    return _MappedRows(_one_split(loaded, name, split or None), repository, Path(config.HF_CACHE_HOME))


def _near_names(place: Path) -> str:
    if not place.parent.is_dir():
        return f"; nor is there a folder {place.parent}. Check the path."
    near = difflib.get_close_matches(place.name, [other.name for other in place.parent.iterdir()], n=3)
    return f"; did you mean {' or '.join(near)}?" if near else "; check the path."
