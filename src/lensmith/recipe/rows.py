"""Rows in hand, written into the run folder once: from then on the run is like any other, resumed, asked and verified.

    outputs/rows/train.jsonl          row 0 of train_dataset is line 1
    outputs/rows/pictures/<digest>    pictures that were in memory: PIL images as lossless files, bytes as they are

Paths stay as they are written, and start from the working directory of the call, which becomes `data.image_root`.
"""

from __future__ import annotations

import datetime
import decimal
import filecmp
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from PIL import Image

from lensmith.data.documents import DOCUMENT_START
from lensmith.data.refs import encode_picture
from lensmith.data.rows import map_rows, open_rows
from lensmith.errors import DataError, RunError
from lensmith.rundir import RunDir, naming_full_disk

ROWS_FOLDER = "rows"
REFERENCES = ("answer", "solution", "ground_truth", "ground_truths", "reference", "label")
"""Columns that hold what a prompt's answer should be, where the prompt stands in a column of its own."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Rows on disk."""

    path: str
    """What data.train or data.test is."""
    num_rows: int


def keep_rows(rows: Any, run: RunDir, name: str, formatting_func: Callable[[Any], Any] | None = None) -> Kept:
    """The rows as a file of the run, or the file itself where they are named by a path.

    Args:
        rows: a list or other iterable of mappings, a data set of `datasets`, or the path of a data file.
        name: `train_dataset` or `eval_dataset`, as messages call it.
        formatting_func: called with each row; returns the row to learn from, or its messages.

    Raises:
        DataError: there are no rows, or one holds what cannot be written.
        RunError: the folder is not free, or holds a run that saw other rows.
    """
    if isinstance(rows, str | Path):
        if formatting_func is not None:
            raise DataError(
                f"{name}: is the path {rows}, which a formatting_func cannot change; give the rows themselves."
            )
        return Kept(str(rows), len(open_rows(rows)))
    run.check_free()
    path = run.path / ROWS_FOLDER / f"{name.removesuffix('_dataset')}.jsonl"
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with naming_full_disk(run.path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            num_rows = _write(beside, rows, name, formatting_func)
            _put(beside, path, run, name)
        finally:
            beside.unlink(missing_ok=True)
    return Kept(str(path), num_rows)


def _write(path: Path, rows: Any, name: str, formatting_func: Callable[[Any], Any] | None) -> int:
    writer, num_rows = RowWriter(path.parent / "pictures"), 0
    with path.open("w", encoding="utf-8", errors="surrogatepass") as file:
        for num_rows, row in enumerate(_each(rows, name), 1):
            where = f"{name}[{num_rows - 1}]"
            fields = _formatted(row, formatting_func, where)
            file.write(json.dumps(writer.plain(with_answer(fields, where), where), ensure_ascii=False) + "\n")
    if not num_rows:
        raise DataError(f"{name}: holds no rows, so there is nothing to learn from. Give at least one.")
    return num_rows


def _put(beside: Path, path: Path, run: RunDir, name: str) -> None:
    if path.is_file() and filecmp.cmp(beside, path, shallow=False):
        return
    if path.is_file() and run.latest_checkpoint() is not None:
        raise RunError(
            f"{run.path}: holds a run that learned from other rows than this {name} ({path} differs), so it cannot be gone on "
            "with. Give another output_dir, or the rows it had."
        )
    beside.replace(path)


def _each(rows: Any, name: str) -> Iterator[Any]:
    """Each row as a mapping or whatever formatting_func takes."""
    import datasets

    if isinstance(rows, datasets.Dataset):
        yield from (row.fields for row in map_rows(rows, name, Path.cwd()))
    elif isinstance(rows, Mapping):
        raise DataError(
            f"{name}: holds {', '.join(map(str, rows))}, but one list of rows is needed, as in {name}=rows['train']."
        )
    elif not isinstance(rows, Iterable) and not hasattr(rows, "__getitem__"):
        raise DataError(
            f"{name}: is a {type(rows).__name__}, but must be rows: a list, a Dataset, an iterable or a path."
        )
    else:
        yield from rows


def _formatted(row: Any, formatting_func: Callable[[Any], Any] | None, where: str) -> Mapping[str, Any]:
    fields = row if formatting_func is None else formatting_func(row)
    if isinstance(fields, list | tuple) and fields and all(isinstance(turn, Mapping) for turn in fields):
        return {"messages": list(fields)}
    if not isinstance(fields, Mapping):
        made = "formatting_func returned" if formatting_func is not None else "is"
        raise DataError(
            f"{where}: {made} a {type(fields).__name__}, but a row is a dict, such as {{'messages': [...]}}. "
            "Texts with special tokens already in them cannot be learned from: the checkpoint's template is applied here."
        )
    return fields


def with_answer(fields: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """TRL's prompt rows as a chat: the turns of `prompt`, then what `completion` or a reference column says."""
    prompt = fields.get("prompt")
    if not _is_chat(prompt):
        return fields
    completion = fields.get("completion")
    kept = {name: value for name, value in fields.items() if name not in ("prompt", "completion")}
    if _is_chat(completion):
        return {"messages": [*prompt, *completion], **kept}
    names = [name for name in REFERENCES if fields.get(name) not in (None, "", [])]
    answer = completion or (fields[names[0]] if names else None)
    if answer is None:
        raise DataError(
            f"{where}: has a prompt, but neither a completion nor an answer. Add a column `answer`, which rewards are compared "
            "with; where none of them looks at it, any text will do."
        )
    answer = answer[0] if isinstance(answer, list | tuple) else answer
    return {"messages": [*prompt, {"role": "assistant", "content": str(answer)}], **kept}


def _is_chat(value: Any) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(turn, Mapping) and "role" in turn for turn in value)
    )


class RowWriter:
    """Turns rows into what JSON can hold; pictures in memory become files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def plain(self, value: Any, where: str) -> Any:
        """
        Raises:
            DataError: it holds something that is neither a value nor a picture.
        """
        if value is None or isinstance(value, str | bool | int | float):
            return value
        if (content := _content(value)) is not None:
            return self._keep(*content)
        if isinstance(value, Mapping):
            return {str(name): self.plain(inner, where) for name, inner in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self.plain(inner, where) for inner in value]
        if isinstance(value, Path | datetime.date | datetime.time | decimal.Decimal):
            return str(value)
        if hasattr(value, "tolist") and value.ndim <= 1:  # numbers of numpy or torch
            return self.plain(value.tolist(), where)
        raise DataError(
            f"{where}: holds a {type(value).__name__}, which no file of rows can hold. Leave it out, or give pictures as PIL "
            "images, arrays of uint8, bytes or paths."
        )

    def _keep(self, content: bytes, suffix: str) -> str:
        path = self.folder / f"{blake2b(content, digest_size=16).hexdigest()}{suffix}"
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(f".{path.name}.{os.getpid()}")
            beside.write_bytes(content)
            beside.replace(path)
        return str(path.resolve())


def _content(value: Any) -> tuple[bytes, str] | None:
    """What a picture or document in memory is as a file, and its suffix; None for anything else."""
    if isinstance(value, Mapping):  # how Hugging Face data sets store a picture
        value = value.get("bytes")
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim in (2, 3):
        value = Image.fromarray(value)
    if isinstance(value, Image.Image):
        return encode_picture(value), ".png"
    if isinstance(value, bytes | bytearray):
        return bytes(value), ".pdf" if value.startswith(DOCUMENT_START) else ".bin"
    return None
