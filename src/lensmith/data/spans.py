"""Where each row lies in a text file: start and end in bytes, and the line or element number that messages name it by.

Everything here is a generator over the file, so that a file larger than memory is indexed in a few bytes per row.
"""

from __future__ import annotations

import csv
import mmap
import re
from collections.abc import Iterator
from pathlib import Path

from lensmith.errors import DataError

Span = tuple[int, int, int]
"""Start and stop in bytes, and the 1-based line on which the row starts (for an array: its 0-based index)."""

BOM = b"\xef\xbb\xbf"
TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}]|[^\s,:"\[\]{}]+', re.DOTALL)
"""A JSON string, a bracket, or anything else that is not white space or punctuation."""


def line_spans(path: Path) -> Iterator[Span]:
    """One row per line; blank lines hold none."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.isspace() and line != BOM:
                yield start, start + len(line), number
            start += len(line)


def starts_array(path: Path) -> bool:
    """Whether the file is one JSON array, rather than one object per line."""
    with path.open("rb") as file:
        return file.read(4096).removeprefix(BOM).lstrip()[:1] == b"["


def json_spans(path: Path) -> Iterator[Span]:
    """One row per element of the array that the file holds.

    Only strings and brackets are told apart, so this neither builds nor checks values: a broken element is reported when
    its row is read, by its index.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        depth, index, start = 0, 0, 0
        for token in TOKEN.finditer(content, content.find(b"[")):
            first = content[token.start()]
            opens, closes = first in b"[{", first in b"]}"
            if depth == 1:
                start = token.start()  # of an element, or of the bracket that ends the array
            depth += opens - closes
            if depth == 1 and not opens:
                yield start, token.end(), index
                index += 1
            if depth == 0:
                return
    raise DataError(
        f"{path}: the JSON array is not closed; the file ends inside element {index} (counted from 0). "
        "It was probably cut off: write it again, or write one row per line to a .jsonl file."
    )


def csv_delimiter(path: Path) -> str:
    """What separates cells: a tab in a .tsv, else whichever of comma, semicolon and tab the first line holds most."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    with path.open("rb") as file:
        first = file.readline().decode("utf-8", errors="replace")
    return max(",;\t", key=first.count)


def csv_spans(path: Path, delimiter: str) -> Iterator[Span]:
    """The header and then one row per record; a record goes on over line ends inside double quotes."""
    stop, line = 0, 0

    def lines() -> Iterator[str]:
        nonlocal stop, line
        with path.open("rb") as file:
            for raw in file:
                stop, line = stop + len(raw), line + 1
                yield raw.decode("utf-8", errors="replace")

    start, first = 0, 1
    try:
        for cells in csv.reader(lines(), delimiter=delimiter):
            if cells:
                yield start, stop, first
            start, first = stop, line + 1
    except csv.Error as cause:
        raise DataError(f"{path}:{first}: cannot be read as CSV ({cause}); save it again as UTF-8 CSV") from cause
