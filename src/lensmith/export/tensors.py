"""Safetensors read a few rows at a time and written as they come: memory holds a piece of one tensor, never a file.

A file's header lists names, types, shapes and places of all its tensors, which are known before the first is computed;
so it is written first, and the tensors follow. https://huggingface.co/docs/safetensors has the format: eight bytes of
length, the header as JSON, the tensors one behind the other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from lensmith.model.stream import INDEX, SINGLE

FILE_BYTES = 2 * 10**9
"""Of one file, after which the next one starts; a tensor is never cut."""
PIECE_VALUES = 2**23
"""Values computed together: 32 MiB in fp32, of which a few exist at a time."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The types that occur in checkpoints and their adapters, by their names in a safetensors header."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Rows(Protocol):
    """A tensor, or one still in its file: `rows[a:b]` reads those rows."""

    def __getitem__(self, rows: slice, /) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """The tensors of one safetensors file by name; memory-mapped, read when rows are asked for."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self._handle: Any = safe_open(str(path), framework="pt", device="cpu")
        self.names: tuple[str, ...] = tuple(self._handle.offset_keys())
        """In the order in which they lie in the file."""

    def entry(self, name: str) -> Entry:
        lazy = self._handle.get_slice(name)
        return Entry(name, tuple(lazy.get_shape()), DTYPES[lazy.get_dtype()])

    def rows(self, name: str) -> Rows:
        lazy = self._handle.get_slice(name)
        return lazy if lazy.get_shape() else self._handle.get_tensor(name)

    def whole(self, name: str) -> Tensor:
        return self._handle.get_tensor(name)


def pieces(shape: Sequence[int]) -> Iterator[slice]:
    """Ranges of rows that hold at most PIECE_VALUES values each (one row where a row holds more)."""
    if not shape:
        yield slice(None)
        return
    step = max(1, PIECE_VALUES // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def piece_of(rows: Rows, piece: slice) -> Tensor:
    """Those rows; all of a tensor that has none, which cannot be sliced."""
    return rows if isinstance(rows, Tensor) and not rows.dim() else rows[piece]


def plan_files(entries: Iterable[Entry], file_bytes: int = FILE_BYTES) -> list[list[Entry]]:
    """The entries in their order, cut into files of about `file_bytes` bytes."""
    files: list[list[Entry]] = [[]]
    held = 0
    for entry in entries:
        if files[-1] and held + entry.nbytes > file_bytes:
            files.append([])
            held = 0
        files[-1].append(entry)
        held += entry.nbytes
    return files


def file_names(count: int) -> list[str]:
    """As transformers names them: `model.safetensors` alone, or numbered parts."""
    return (
        [SINGLE] if count == 1 else [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    )


def write_header(file: BinaryIO, entries: Sequence[Entry]) -> None:
    """What a safetensors file begins with; the bytes of the entries must follow, in the same order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.nbytes
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin on a multiple of eight
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)


def write_values(file: BinaryIO, values: Tensor) -> None:
    """The bytes of a tensor, or of some of its rows."""
    file.write(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_index(folder: Path, files: Sequence[Sequence[Entry]]) -> None:
    """Which tensor is in which file, where there is more than one."""
    if len(files) == 1:
        return
    places = {
        entry.name: file for file, entries in zip(file_names(len(files)), files, strict=True) for entry in entries
    }
    total = sum(entry.nbytes for entries in files for entry in entries)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2)
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")
