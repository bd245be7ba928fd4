"""A list of rows with the methods that recipes use; content may be a text here and a list of parts there.

`datasets.Dataset` keeps columns of one type and refuses such rows (ArrowInvalid); a row here is a dict, whatever it holds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from lensmith.errors import DataError

Row = dict[str, Any]


class Dataset(Sequence[Row]):
    """See the module. Nothing is read or copied: rows stay what they are until a trainer writes them into its run."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """
        Raises:
            DataError: a row is no mapping.
        """
        self._rows: list[Row] = []
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise DataError(f"Dataset: row {number} is a {type(row).__name__}, but must be a dict of columns.")
            self._rows.append(dict(row))
        self.made_in = Path.cwd()
        """The working directory when it was made; relative image paths start from that of the trainer's call."""

    @classmethod
    def from_list(cls, mapping: Iterable[Mapping[str, Any]], **ignored: Any) -> Dataset:
        _refuse("from_list", ignored)
        return cls(mapping)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Sequence[Any]], **ignored: Any) -> Dataset:
        """Columns of one length."""
        _refuse("from_dict", ignored)
        lengths = {name: len(values) for name, values in mapping.items()}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise DataError(f"Dataset.from_dict: columns differ in length ({told}); each row needs one value of each.")
        return cls(
            {name: values[row] for name, values in mapping.items()} for row in range(max([*lengths.values(), 0]))
        )

    @classmethod
    def from_generator(
        cls,
        generator: Callable[..., Iterable[Mapping[str, Any]]],
        gen_kwargs: Mapping[str, Any] | None = None,
        **ignored: Any,
    ) -> Dataset:
        _refuse("from_generator", ignored)
        return cls(generator(**(gen_kwargs or {})))

    @property
    def column_names(self) -> list[str]:
        return list(dict.fromkeys(name for row in self._rows for name in row))

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Dataset: ...
    @overload
    def __getitem__(self, index: str) -> list[Any]: ...
    def __getitem__(self, index: int | slice | str) -> Any:
        """A row, some rows, or a column, which has None where a row lacks it."""
        if isinstance(index, str):
            if index not in self.column_names:
                raise DataError(f"Dataset: there is no column {index!r} among {', '.join(self.column_names)}.")
            return [row.get(index) for row in self._rows]
        return self._like(self._rows[index]) if isinstance(index, slice) else dict(self._rows[index])

    def __iter__(self) -> Iterator[Row]:
        return (dict(row) for row in self._rows)

    def __repr__(self) -> str:
        return f"Dataset({{features: {self.column_names}, num_rows: {len(self)}}})"

    def map(
        self, function: Callable[..., Mapping[str, Any]], *, remove_columns: Sequence[str] = (), **ignored: Any
    ) -> Dataset:
        """Each row with what the function returns for it put on top."""
        _refuse("map", ignored)
        gone = {remove_columns} if isinstance(remove_columns, str) else set(remove_columns)
        return self._like(
            {name: value for name, value in row.items() if name not in gone} | dict(function(dict(row)))
            for row in self._rows
        )

    def filter(self, function: Callable[[Row], bool], **ignored: Any) -> Dataset:
        _refuse("filter", ignored)
        return self._like(row for row in self._rows if function(dict(row)))

    def select(self, indices: Iterable[int]) -> Dataset:
        return self._like(self._rows[index] for index in indices)

    def shuffle(self, seed: int = 0) -> Dataset:
        return self._like(random.Random(seed).sample(self._rows, len(self)))

    def train_test_split(self, test_size: float | int = 0.25, seed: int = 0) -> dict[str, Dataset]:
        """By row; a share, or a number of rows. `data.test` of a run splits by image instead."""
        held = test_size if isinstance(test_size, int) else max(1, round(test_size * len(self)))
        shuffled = self.shuffle(seed)
        return {"train": shuffled[held:], "test": shuffled[:held]}

    def remove_columns(self, column_names: str | Sequence[str]) -> Dataset:
        return self.map(lambda _: {}, remove_columns=[column_names] if isinstance(column_names, str) else column_names)

    def rename_column(self, original_column_name: str, new_column_name: str) -> Dataset:
        names = {original_column_name: new_column_name}
        return self._like({names.get(name, name): value for name, value in row.items()} for row in self._rows)

    def add_column(self, name: str, column: Sequence[Any]) -> Dataset:
        return self._like({**row, name: value} for row, value in zip(self._rows, column, strict=True))

    def _like(self, rows: Iterable[Mapping[str, Any]]) -> Dataset:
        made = Dataset(rows)
        made.made_in = self.made_in
        return made


HARMLESS = {"num_proc", "desc", "load_from_cache_file", "keep_in_memory", "writer_batch_size", "cache_dir"}
"""Keywords of `datasets` about how it works, not what comes out."""


def _refuse(method: str, keywords: Mapping[str, Any]) -> None:
    if unknown := sorted(set(keywords) - HARMLESS):
        raise DataError(
            f"Dataset.{method}: there is no keyword {unknown[0]}. This is a plain list of rows; use `datasets` for more, "
            "whose data sets the trainers take as well."
        )
